"""`python -m lmscale VERB ...`: the entry of ranks and of every verb that needs torch or many cores.

Only the standard library is imported before the verb is known and signals are caught: importing torch takes
seconds, and a Ctrl-C in that time must not end in a traceback.
"""

import importlib
import os
import sys
import traceback

from lmscale.errors import ExitCode, LmscaleError, UsageError

VERBS = {
    "train": ("lmscale.train.main", "main"),
    "eval": ("lmscale.train.eval_command", "main"),
    "generate": ("lmscale.train.generate_command", "main"),
    "prepare": ("lmscale.prepare.command", "prepare_main"),
}


def main(argv: list[str]) -> int:
    """Run one verb and return its exit code."""
    if not argv or argv[0] not in VERBS:
        raise UsageError(f"python -m lmscale VERB ...: VERB is one of {', '.join(VERBS)}")
    module, function = VERBS[argv[0]]
    if argv[0] != "train":
        return int(getattr(importlib.import_module(module), function)(argv[1:]))
    from lmscale.train.signals import StopRequest

    with StopRequest() as stop:
        return int(getattr(importlib.import_module(module), function)(argv[1:], stop))


def guarded(argv: list[str]) -> int:
    """`main`, with every error turned into words on standard error and an exit code."""
    try:
        return main(argv)
    except LmscaleError as error:
        print(f"{_rank()}{type(error).__name__}: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 128 + 2
    except BrokenPipeError:
        return 128 + 13
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"{_rank()}{place}{error.strerror or error}; start again once it is mended",
            file=sys.stderr,
        )
        return int(ExitCode.RETRY)
    except Exception:
        print(f"{_rank()}this is a bug in lmscale:\n{traceback.format_exc()}", file=sys.stderr)
        return int(ExitCode.BUG)


def _rank() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[r{rank}] "


if __name__ == "__main__":
    code = guarded(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # After a failure, threads of torch's process groups may wait for peers that are gone; the operating
    # system frees everything they hold.
    os._exit(code) if code else sys.exit(0)
