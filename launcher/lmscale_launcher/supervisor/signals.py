"""Signals to the supervisor, collected for its event loop."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

# A scheduler, a terminal and a script may each forward the same signal.
REPEAT_S = 2.0
# A closed terminal is a request to save and stop, unless nohup has had it ignored.
_FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGHUP: signal.SIGTERM,
}


class Signals:
    """Collects signals while it is entered; `descriptor` becomes readable when one has arrived."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: list[signal.Signals] = []
        self._last: dict[signal.Signals, float] = {}
        self._before: dict[signal.Signals, Any] = {}
        self.descriptor, self._write = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write, False)

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: collect the signal."""
        if number != signal.SIGCHLD:
            self._pending.append(signal.Signals(number))

    def take(self) -> list[signal.Signals]:
        """The signals to forward to the ranks; repeats within 2 s are dropped."""
        self.drain()
        pending, self._pending = self._pending, []
        return [number for number in map(_FORWARDED.__getitem__, pending) if self.is_new(number)]

    def drain(self) -> None:
        """Empty the pipe, so that `descriptor` is not readable until the next signal."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, 4096)

    def is_new(self, number: signal.Signals) -> bool:
        """Whether a request to stop, of this or another node, is not a repeat. Notes it as the latest."""
        now = self._clock()
        if now - self._last.get(number, -REPEAT_S) < REPEAT_S:
            return False
        self._last[number] = now
        return True

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (*_FORWARDED, signal.SIGCHLD):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.descriptor)
        os.close(self._write)
