"""The process around a verb: signals before anything heavy is imported, errors as messages, exit codes.

Only the standard library is imported before signals are caught: importing torch takes seconds, and a
Ctrl-C in that time must not end in a traceback.
"""

import atexit
import errno
import os
import signal
import sys
import traceback
from contextlib import nullcontext
from typing import TYPE_CHECKING, NoReturn

from lmscale.base.errors import ExitCode, LmscaleError
from lmscale.base.fs import storage_error

if TYPE_CHECKING:
    from lmscale.train.stop_request import StopRequest


def main() -> NoReturn:
    """Run the command line of this process and end the process with the exit code of the verb."""
    argv = sys.argv[1:]
    rank_variables = _rank_variables(argv)
    if rank_variables is not None:
        from lmscale.train.stop_request import StopRequest

        os.environ |= rank_variables
        context: StopRequest | nullcontext[None] = StopRequest()
    else:
        context = nullcontext()
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a verb without a traceback
    with context as stop:
        code = run(argv, stop)
    _exit(code)


def run(argv: list[str], stop: "StopRequest | None" = None) -> int:
    """Run one verb; every error becomes a message on standard error and an exit code.

    `stop` is given where this process is one rank of `train`.
    """
    try:
        return _invoke(argv, stop)
    except LmscaleError as error:
        _report(f"error: {error}")
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OSError as error:
        failure = storage_error(f"reading or writing {error.filename or 'a file'}", error)
        _report(f"error: {failure}")
        return int(failure.exit_code)
    except Exception:
        _report(f"this is a bug in lmscale:\n{traceback.format_exc()}")
        return int(ExitCode.BUG)


def _invoke(argv: list[str], stop: "StopRequest | None") -> int:
    import typer

    from lmscale.cli.app import app

    try:
        return int(app(args=argv, prog_name="lmscale", obj=stop, standalone_mode=False) or 0)
    except (
        typer.Abort
    ) as aborted:  # typer makes it of a KeyboardInterrupt, and of an EOFError of any library
        if isinstance(aborted.__cause__, EOFError):
            raise aborted.__cause__ from None
        return 128 + signal.SIGINT
    except SystemExit as exited:  # of shell completion, and what typer makes of a closed pipe
        if isinstance(exited.__context__, OSError) and exited.__context__.errno == errno.EPIPE:
            return 128 + signal.SIGPIPE
        return int(exited.code or 0)
    except Exception as error:
        # Usage errors of click. Newer versions of typer contain a copy of click whose classes have no
        # public name, so they are recognised by what they can do.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        return int(error.exit_code)


def _rank_variables(argv: list[str]) -> dict[str, str] | None:
    """What to add to the environment of a rank; None where this process is not a rank of `train`."""
    if argv[:1] != ["train"] or any(arg.split("=")[0] == "--nproc" for arg in argv):
        return None
    from lmscale_launcher.rank_mode import rank_env

    return rank_env(os.environ)


def _report(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    sys.stderr.write(f"{message}\n" if rank == "0" else f"[r{rank}] {message}\n")


def _exit(code: int) -> NoReturn:
    if "torch" not in sys.modules:
        sys.exit(code)
    if code == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own way out has been seen to abort ("terminate called without an active exception", 134, after
    # a run that had succeeded): threads of torch that want the interpreter while it is taken down. And after
    # a failure they may wait for peers that are gone. The operating system frees everything they hold.
    os._exit(code)
