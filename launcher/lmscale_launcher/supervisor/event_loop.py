"""The one selector of a supervisor: output of ranks, connections and signals wake the same loop."""

import selectors
import time
from collections.abc import Callable
from typing import Self

# One turn adds at most this to awake_s: a longer turn means that this process was stopped or blocked.
_MAX_TURN_S = 1.0


class EventLoop:
    """Waits for the first event of all watched descriptors and calls its handler."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._turned_at = time.monotonic()
        self.awake_s = 0.0  # how long this process has run, without times in which it was stopped

    def watch(self, descriptor: int, on_read: Callable[[], None]) -> None:
        """Call `on_read` when the descriptor is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, (on_read, None))

    def watch_writes(self, descriptor: int, on_write: Callable[[], None] | None) -> None:
        """Also call `on_write` when the descriptor is writable; None ends this."""
        key = self._selector.get_key(descriptor)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if on_write else 0)
        self._selector.modify(descriptor, events, (key.data[0], on_write))

    def forget(self, descriptor: int) -> None:
        """Stop watching the descriptor."""
        self._selector.unregister(descriptor)

    def turn(self, timeout_s: float) -> None:
        """Wait for events, at most this long, and call their handlers."""
        for key, events in self._selector.select(timeout_s):
            on_read, on_write = key.data
            if events & selectors.EVENT_WRITE and on_write is not None:
                on_write()
            # Writing may have found the connection closed and forgotten it.
            if events & selectors.EVENT_READ and key.fd in self._selector.get_map():
                on_read()
        now = time.monotonic()
        self.awake_s += min(now - self._turned_at, _MAX_TURN_S)
        self._turned_at = now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
