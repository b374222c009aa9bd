"""One worker process: reads jobs as JSON lines and answers with JSON lines.

workers.py starts it as `python -m lmscale.prepare.worker PARENT_PID`. It ends when its parent ends.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from lmscale.base.errors import LmscaleError
from lmscale.base.proc import die_with_parent
from lmscale.prepare.workers import do_job

_REPORT_S = 0.2


def answer(line: str, report: Callable[[int], None]) -> dict[str, Any]:
    """Do one piece of work and say how it went."""
    try:
        return {"done": do_job(json.loads(line), report)}
    except LmscaleError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception:
        return {"error": "bug", "message": traceback.format_exc()}


def main(parent: int) -> None:
    """Serve until standard input ends."""
    die_with_parent(parent, exit_code=1)  # where that is not supported, the closed pipe ends it
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    last = time.monotonic()

    def report(consumed: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _REPORT_S:
            last = now
            say({"consumed": consumed})

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    for line in sys.stdin:
        say(answer(line, report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
