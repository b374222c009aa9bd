"""`python -m lmscale VERB ...`: the entry of ranks and of every verb that needs torch or many cores.

Only the standard library is imported before the verb is known and signals are caught: importing torch takes
seconds, and a Ctrl-C in that time must not end in a traceback.
"""

import atexit
import importlib
import os
import sys
import traceback

from lmscale.base.errors import ExitCode, LmscaleError, UsageError
from lmscale.base.fs import storage_error

VERBS = {
    "train": ("lmscale.train.main", "main"),
    "eval": ("lmscale.train.commands", "eval_main"),
    "generate": ("lmscale.train.commands", "generate_main"),
    "prepare": ("lmscale.prepare.command", "prepare_main"),
    "probe": ("lmscale.distributed.probe", "main"),
}


def main(argv: list[str]) -> int:
    """Run one verb and return its exit code."""
    if not argv or argv[0] not in VERBS:
        raise UsageError(f"python -m lmscale VERB ...: VERB is one of {', '.join(VERBS)}")
    module, function = VERBS[argv[0]]
    if argv[0] != "train":
        return int(getattr(importlib.import_module(module), function)(argv[1:]))
    from lmscale.train.stop_request import StopRequest

    with StopRequest() as stop:
        return int(getattr(importlib.import_module(module), function)(argv[1:], stop))


def guarded(argv: list[str]) -> int:
    """`main`, with every error turned into words on standard error and an exit code."""
    try:
        return main(argv)
    except LmscaleError as error:
        print(f"{_rank()}error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 128 + 2
    except BrokenPipeError:
        return 128 + 13
    except OSError as error:
        failure = storage_error(f"reading or writing {error.filename or 'a file'}", error)
        print(f"{_rank()}{failure}", file=sys.stderr)
        return int(failure.exit_code)
    except Exception:
        print(f"{_rank()}this is a bug in lmscale:\n{traceback.format_exc()}", file=sys.stderr)
        return int(ExitCode.BUG)


def _rank() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[r{rank}] "


if __name__ == "__main__":
    code = guarded(sys.argv[1:])
    if code == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own way out has been seen to abort ("terminate called without an active exception", 134, after
    # a run that had succeeded): threads of torch that want the interpreter while it is taken down. And after
    # a failure they may wait for peers that are gone. The operating system frees everything they hold.
    os._exit(code)
