"""One worker process: it reads jobs as JSON lines and answers with JSON lines.

workers.py starts it as `python -m lmscale.prepare.worker PARENT_PID`. It ends when its parent ends.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from lmscale.base.decoding import decode
from lmscale.base.errors import LmscaleError
from lmscale.base.proc import die_with_parent
from lmscale.prepare.workers import do_job, error_kind

_REPORT_S = 0.2


def answer(line: str, report: Callable[[int], None]) -> dict[str, Any]:
    """Do the job that a line describes and return the message about its result or its error."""
    try:
        job = decode(dict[str, Any], line, where="a job from the parent process")
        return {"done": do_job(job, report)}
    except LmscaleError as error:
        return {"error": error_kind(error), "message": str(error)}
    except Exception:
        return {"error": "bug", "message": traceback.format_exc()}


def main(parent: int) -> None:
    """Serve until standard input ends."""
    # Where the kernel has no death signal, the closed pipe ends this process.
    die_with_parent(parent, exit_code=1)
    # Output of libraries must not mix with the messages: descriptor 1 becomes standard error.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    reported_s = time.monotonic()

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    def report(consumed: int) -> None:
        nonlocal reported_s
        if (now := time.monotonic()) - reported_s >= _REPORT_S:
            reported_s = now
            send({"consumed": consumed})

    for line in sys.stdin:
        send(answer(line, report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
