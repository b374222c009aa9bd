"""Requests to stop: TERM, INT and USR2 set a flag; the ranks agree on the step at which all of them save.

No torch here: handlers are installed before it is imported.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

# A terminal's Ctrl-C, a supervisor and a scheduler may all pass the same signal on.
_REPEAT_S = 2.0


class StopRequest:
    """Catches the stop signals while it is entered. A second Ctrl-C, two seconds or more later, ends at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.stop_file_found = False  # rank 0 has seen RUN/stop
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        """Where the request came from, as text; empty before a request."""
        if self.signal is not None:
            return f"asked to stop by {self.signal.name}"
        return "asked to stop by lmscale stop" if self.stop_file_found else ""

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self.signal is not None and now - self._at > _REPEAT_S
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._at = signal.Signals(number), now
