"""One start of all ranks of this host, watched until the last of them has ended."""

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.guard import Guard
from launcher.output import Output
from launcher.signals import Signals
from launcher.spawn import RankProcess
from lmscale.errors import ExitCode
from lmscale.run.events import BEAT_S, EventLog
from lmscale.run.folder import RunFolder

_TICK_S = 0.5  # how late RUN/stop and a missed SIGCHLD are noticed
# A peer that has lost the dead rank usually ends by itself, and its own code may be the telling one.
_HUSH_S = 0.5
_DRAIN_S = 2.0  # for output still in the pipes after the last rank has ended
_READ_BYTES = 1 << 16
# Ranks that end like this have agreed on it; their peers are about to follow by themselves.
_AGREED = (ExitCode.DONE, ExitCode.SAVED)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a start ended."""

    codes: dict[int, int]  # by rank
    stop_requested: bool


class Watch:
    """The loop around running ranks. It has one thread, which `spawn` relies on."""

    def __init__(
        self,
        ranks: Sequence[RankProcess],
        *,
        folder: RunFolder,
        events: EventLog,
        output: Output,
        signals: Signals,
        guard: Guard,
        grace_s: float,
    ) -> None:
        self._alive = {one.rank: one for one in ranks}
        self._codes: dict[int, int] = {}
        self._folder = folder
        self._events = events
        self._output = output
        self._signals = signals
        self._guard = guard
        self._grace_s = grace_s
        self._term_at: float | None = None
        self._kill_at: float | None = None
        self._beat_at = 0.0
        self._stop_requested = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals.descriptor, selectors.EVENT_READ, None)
        for one in ranks:
            self._selector.register(one.output, selectors.EVENT_READ, one)

    def until_the_end(self) -> Ended:
        """Pass on output and signals, end all when one dies; returns when all have ended."""
        try:
            while self._alive:
                self._wait(_TICK_S)
                self._look_after()
            drained_at = time.monotonic() + _DRAIN_S
            while len(self._selector.get_map()) > 1 and time.monotonic() < drained_at:
                self._wait(0.05)
        finally:
            self._end()
        return Ended(dict(sorted(self._codes.items())), self._stop_requested)

    def _look_after(self) -> None:
        for number in self._signals.take():
            self._request_stop(number)
        if not self._stop_requested and self._folder.stop.exists():
            self._output.say(f"{self._folder.stop} has appeared: saving and stopping")
            self._request_stop(signal.SIGTERM)
        for one in [one for one in self._alive.values() if one.has_exited()]:
            self._bury(one)
        for one in self._alive.values():
            one.follow_size()
        now = time.monotonic()
        self._end_peers(now)
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            with contextlib.suppress(OSError):  # the next one may succeed
                self._events.beat()

    def _request_stop(self, number: signal.Signals) -> None:
        self._stop_requested = True
        for one in self._alive.values():
            one.send(number)

    def _bury(self, one: RankProcess) -> None:
        code = one.reap()
        self._guard.remove(one.pid)
        del self._alive[one.rank]
        if code - 128 in one.ended:
            code = ExitCode.RETRY  # we ended it: not the cause, it has lost a peer
        self._codes[one.rank] = int(code)
        if code in _AGREED or self._kill_at is not None:
            return
        self._term_at = time.monotonic() + _HUSH_S
        self._kill_at = self._term_at + self._grace_s
        if self._alive:
            self._output.say(f"rank {one.rank} has ended ({describe(code)}): ending the others")

    def _end_peers(self, now: float) -> None:
        """After a rank has died: TERM, time to leave a collective, KILL."""
        if self._term_at is not None and now >= self._term_at:
            self._term_at = None
            for peer in self._alive.values():
                peer.ended.add(signal.SIGTERM)
                peer.send(signal.SIGTERM)
        if self._kill_at is not None and now >= self._kill_at:
            for peer in self._alive.values():
                peer.ended.add(signal.SIGKILL)
                peer.kill()

    def _wait(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.data is not None:
                self._read(key.data)

    def _read(self, one: RankProcess) -> None:
        try:
            data = os.read(one.output, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: the other side of a pseudo-terminal is closed
            data = b""
        if data:
            self._output.feed(one.rank, data)
        else:
            self._forget(one)

    def _forget(self, one: RankProcess) -> None:
        self._selector.unregister(one.output)
        os.close(one.output)

    def _end(self) -> None:
        for one in self._alive.values():
            one.reap()
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._forget(key.data)
        self._selector.close()


def describe(code: int) -> str:
    """An exit code in words."""
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"died by {signal.Signals(code - 128).name}, {code}"
    with contextlib.suppress(ValueError):
        return f"{ExitCode(code).name.lower()}, {code}"
    return str(code)
