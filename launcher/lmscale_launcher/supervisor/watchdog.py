"""When does nothing move any more, and which rank is to blame? Pure, but for reading the ranks' pulses.

Ranks of one job go in step: one that hangs holds all of them up, and the peers that wait for it look just as
idle. So the job is stuck only when no rank at all has moved for the limit, and to blame is a process
that the kernel has stopped, else the rank that is the least far.

One start of all ranks of this host, watched until the last of them has ended.
"""

import os
import signal
import time
from collections.abc import Sequence
from functools import partial

from lmscale.base.errors import ExitCode
from lmscale.run_folder.rank_progress import (
    read_beat,
    read_stack,
)
from lmscale_launcher.supervisor.context import SupervisorContext
from lmscale_launcher.supervisor.protocol import (
    Order,
    RoundEnd,
    StackRequest,
    StopOrder,
    SupervisorGroup,
)
from lmscale_launcher.supervisor.rank_process import RankProcess
from lmscale_launcher.supervisor.stall import ProgressReadings

_TICK_S = 0.5  # how late RUN/stop and a missed SIGCHLD are noticed
# A peer that has lost the dead rank usually ends by itself, and its own code may be the telling one.
_HUSH_S = 0.5
_DRAIN_S = 2.0  # for output still in the pipes after the last rank has ended
_UNDYING_S = 10.0  # after SIGKILL
_STACK_S = 2.0  # for faulthandler to answer
_LOOK_S = 0.1  # between two looks at what it has written: the same twice is all of it
_READ_BYTES = 1 << 16
# Ranks that end like this have agreed on it; their peers are about to follow by themselves.
_AGREED = (ExitCode.DONE, ExitCode.SAVED)


class Watchdog:
    """The loop around running ranks. It has one thread, which `spawn` relies on."""

    def __init__(
        self, ranks: Sequence[RankProcess], team: SupervisorGroup, station: SupervisorContext
    ) -> None:
        self._alive = {one.rank: one for one in ranks}
        self._codes: dict[int, int] = {}
        self._team = team
        self._loop = station.loop
        self._output = station.output
        self._signals = station.signals
        self._guard = station.guard
        self._grace_s = station.job.grace_s
        self._ranked = station.job.place.ranked
        self._pulses = ProgressReadings(station.job.patience, now_s=station.loop.awake_s)
        self._term_at: float | None = None
        self._kill_at: float | None = None
        self._undying_said = False
        self._tick_at = 0.0
        self._examined: RankProcess | None = None
        self._examined_at = self._looked_at = 0.0
        self._stack = ""
        self._open = {one.output: one for one in ranks}
        for one in ranks:
            station.loop.watch(one.output, partial(self._read, one))

    def until_the_end(self) -> dict[int, int]:
        """Pass on output and signals, end all when one dies; returns their codes when all have ended."""
        try:
            while self._alive or self._team.busy:
                self._loop.turn(_TICK_S)
                self._look_after()
            drained_at = time.monotonic() + _DRAIN_S
            while self._open and time.monotonic() < drained_at:
                self._loop.turn(0.05)
        finally:
            self._end()
        return dict(sorted(self._codes.items()))

    def _look_after(self) -> None:
        for number in self._signals.take():
            self._request_stop(number)
            self._team.stop(number)
        for order in self._team.take():
            self._obey(order)
        for one in [one for one in self._alive.values() if one.has_exited()]:
            self._bury(one)
        for one in self._alive.values():
            one.follow_size()
        now = time.monotonic()
        self._examine(now)
        self._end_peers(now)
        if now - self._tick_at >= _TICK_S:
            self._tick_at = now
            alive = list(self._alive.values())
            self._team.tick(self._pulses.pace(alive, now_s=self._loop.awake_s))

    def _obey(self, order: Order) -> None:
        match order:
            case StopOrder(number):
                self._request_stop(number)
            case RoundEnd():
                self._end_all()
            case StackRequest(rank) if rank in self._alive:
                one = self._alive[rank]
                if (
                    one.pulse is not None and read_beat(one.pulse).count
                ):  # else nobody would catch it
                    one.send(signal.SIGQUIT)
                    one.send(signal.SIGCONT)  # a stopped process answers no signal
                self._examined = one
                self._examined_at = self._looked_at = time.monotonic()

    def _request_stop(self, number: signal.Signals) -> None:
        if not self._ranked:
            # mpirun passes USR2 on to its ranks; after TERM or INT it kills them within 0.3 s.
            number = signal.SIGUSR2
        for one in self._alive.values():
            one.send(number)

    def _examine(self, now: float) -> None:
        """Pass on the stack of the stuck rank once it is whole, and kill it: its peers follow."""
        one = self._examined
        if one is None or now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        text = read_stack(one.stack) if one.stack is not None else ""
        whole = bool(text) and text == self._stack
        if not whole and now - self._examined_at < _STACK_S and one.rank in self._alive:
            self._stack = text
            return
        self._examined = None
        self._team.stack(one.rank, text)
        if one.rank in self._alive:  # else its group's number may be another's by now
            one.kill()

    def _bury(self, one: RankProcess) -> None:
        code = one.reap()
        self._guard.remove(one.pid)
        del self._alive[one.rank]
        if code - 128 in one.ended:
            code = ExitCode.RETRY  # we ended it: not the cause, it has lost a peer
        self._codes[one.rank] = int(code)
        if code in _AGREED or (self._kill_at is not None and code == ExitCode.RETRY):
            return
        self._team.died(one.rank, int(code), others=bool(self._alive))
        self._end_all()

    def _end_all(self) -> None:
        if self._kill_at is None:
            self._term_at = time.monotonic() + _HUSH_S
            self._kill_at = self._term_at + self._grace_s

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
            if self._alive and not self._undying_said and now >= self._kill_at + _UNDYING_S:
                self._undying_said = True
                names = ", ".join(
                    f"{one.rank} (state {one.state()})" for one in self._alive.values()
                )
                self._output.say(
                    f"rank {names} cannot be killed: the kernel waits for a disk, a file server or a GPU, "
                    "and this node for it"
                )

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
        del self._open[one.output]
        self._loop.forget(one.output)
        os.close(one.output)

    def _end(self) -> None:
        for one in self._alive.values():
            one.reap()
        for one in list(self._open.values()):
            self._forget(one)
