"""The one selector of a supervisor: output of ranks, connections and signals all wake the same loop."""

import selectors
import time
from collections.abc import Callable
from typing import Self

# A turn counts at most this much: longer means that this process itself was stopped or blocked.
_MOST_S = 1.0


class EventLoop:
    """Waits for whatever comes first, and hands it to who asked for it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._at = time.monotonic()
        self.awake_s = (
            0.0  # how long this process has been looking: by this clock others are silent
        )

    def watch(self, descriptor: int, on_read: Callable[[], None]) -> None:
        """Call when there is something to read."""
        self._selector.register(descriptor, selectors.EVENT_READ, (on_read, None))

    def watch_writes(self, descriptor: int, on_write: Callable[[], None] | None) -> None:
        """Also call when there is room to write; None: no longer."""
        key = self._selector.get_key(descriptor)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if on_write else 0)
        self._selector.modify(descriptor, events, (key.data[0], on_write))

    def forget(self, descriptor: int) -> None:
        """No longer watch it."""
        self._selector.unregister(descriptor)

    def turn(self, timeout_s: float) -> None:
        """Wait until something has come, or for this long."""
        for key, events in self._selector.select(timeout_s):
            on_read, on_write = key.data
            if events & selectors.EVENT_WRITE and on_write is not None:
                on_write()
            # Writing may have found the connection closed and forgotten it.
            if events & selectors.EVENT_READ and key.fd in self._selector.get_map():
                on_read()
        now = time.monotonic()
        self.awake_s += min(now - self._at, _MOST_S)
        self._at = now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
