"""The parent receives every message of its workers, in whatever pieces they arrive."""

import subprocess
import sys
import threading
from typing import Any

import pytest

from lmscale.prepare import workers as pool

TWO_LINES_AT_ONCE = """
import sys
for _ in sys.stdin:
    sys.stdout.write('{"consumed": 1}\\n{"done": 7}\\n')
    sys.stdout.flush()
"""


def test_two_messages_that_arrive_together_are_both_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the parent was asleep (Ctrl-Z, a busy machine) while a worker wrote both."""
    start = subprocess.Popen

    def chatty(argv: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", TWO_LINES_AT_ONCE], **options)

    monkeypatch.setattr(pool.subprocess, "Popen", chatty)
    got: list[tuple[int, Any]] = []
    jobs: list[Any] = [{"call": "a"}, {"call": "b"}, {"call": "c"}]
    run = threading.Thread(
        target=lambda: got.extend(pool.run_all(jobs, num_workers=2, report=lambda *_: None)),
        daemon=True,
    )
    run.start()
    run.join(15)
    assert not run.is_alive(), "the pool waits for an answer that it has already read"
    assert sorted(got) == [(0, 7), (1, 7), (2, 7)]
