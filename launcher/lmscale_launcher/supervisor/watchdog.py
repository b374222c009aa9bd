"""One round on this node, watched from its first process to the last: output, signals, deaths, stuck ranks."""

import os
import signal
import time
from collections.abc import Sequence
from functools import partial

from lmscale.base.errors import ExitCode
from lmscale.run_folder.rank_progress import read_beat, read_stack
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

_TICK_S = 0.5  # RUN/stop and a missed SIGCHLD are noticed this late at most
# Peers of a dead rank usually end by themselves, and the exit code of a peer may name the cause.
_PEER_EXIT_GRACE_S = 0.5
_DRAIN_S = 2.0  # for output that is still in the pipes after the last rank has ended
_KILL_REPORT_AFTER_S = 10.0  # after SIGKILL
_STACK_TIMEOUT_S = 2.0  # for faulthandler to write the stack
_STACK_POLL_S = 0.1  # the same text at two polls is complete
_READ_BYTES = 1 << 16
# Ranks that end with one of these have agreed on it; their peers are about to end by themselves.
_AGREED_CODES = (ExitCode.DONE, ExitCode.SAVED)


class Watchdog:
    """The event loop around running processes. It has one thread, which `spawn` relies on."""

    def __init__(
        self, ranks: Sequence[RankProcess], group: SupervisorGroup, context: SupervisorContext
    ) -> None:
        self._alive = {rank.rank: rank for rank in ranks}
        self._codes: dict[int, int] = {}
        self._group = group
        self._loop = context.loop
        self._output = context.output
        self._signals = context.signals
        self._guard = context.guard
        self._grace_s = context.job.grace_s
        self._ranked = context.job.topology.ranked
        self._readings = ProgressReadings(context.job.stall_limits, now_s=context.loop.awake_s)
        self._term_at: float | None = None  # when peers of a dead rank get SIGTERM
        self._kill_at: float | None = None  # and SIGKILL
        self._kill_reported = False
        self._ticked_at = 0.0
        self._stuck: RankProcess | None = None  # whose stack is awaited
        self._stack_requested_at = self._stack_polled_at = 0.0
        self._stack_text = ""
        self._open = {rank.output: rank for rank in ranks}
        for rank in ranks:
            context.loop.watch(rank.output, partial(self._read, rank))

    def run(self) -> dict[int, int]:
        """Watch until all processes of the round have ended; the exit code of each rank.

        When one of them dies, all others of the round are ended.
        """
        try:
            while self._alive or self._group.busy:
                self._loop.turn(_TICK_S)
                self._handle_events()
            drained_at = time.monotonic() + _DRAIN_S
            while self._open and time.monotonic() < drained_at:
                self._loop.turn(0.05)
        finally:
            self._close()
        return dict(sorted(self._codes.items()))

    def _handle_events(self) -> None:
        for number in self._signals.take():
            self._request_stop(number)
            self._group.stop(number)
        for order in self._group.take():
            self._execute(order)
        for rank in [rank for rank in self._alive.values() if rank.has_exited()]:
            self._reap(rank)
        for rank in self._alive.values():
            rank.follow_size()
        now = time.monotonic()
        self._poll_stack(now)
        self._end_peers(now)
        if now - self._ticked_at >= _TICK_S:
            self._ticked_at = now
            alive = list(self._alive.values())
            self._group.tick(self._readings.pace(alive, now_s=self._loop.awake_s))

    def _execute(self, order: Order) -> None:
        match order:
            case StopOrder(number):
                self._request_stop(number)
            case RoundEnd():
                self._begin_end()
            case StackRequest(number) if number in self._alive:
                rank = self._alive[number]
                # A rank that has reported no progress yet has no handler for SIGQUIT, which would kill it.
                if rank.progress_fd is not None and read_beat(rank.progress_fd).count:
                    rank.send(signal.SIGQUIT)
                    rank.send(signal.SIGCONT)  # a stopped process handles no signal
                self._stuck = rank
                self._stack_requested_at = self._stack_polled_at = time.monotonic()

    def _request_stop(self, number: signal.Signals) -> None:
        if not self._ranked:
            # mpirun forwards USR2 to its ranks; after TERM or INT it kills them within 0.3 s.
            number = signal.SIGUSR2
        for rank in self._alive.values():
            rank.send(number)

    def _poll_stack(self, now: float) -> None:
        """Report the stack of the stuck rank once it is complete, and kill the rank; its peers follow."""
        rank = self._stuck
        if rank is None or now - self._stack_polled_at < _STACK_POLL_S:
            return
        self._stack_polled_at = now
        text = read_stack(rank.stack_fd) if rank.stack_fd is not None else ""
        complete = bool(text) and text == self._stack_text
        waiting = now - self._stack_requested_at < _STACK_TIMEOUT_S
        if not complete and waiting and rank.rank in self._alive:
            self._stack_text = text
            return
        self._stuck = None
        self._group.stack(rank.rank, text)
        if rank.rank in self._alive:  # else the number of its process group may have been reused
            rank.kill()

    def _reap(self, rank: RankProcess) -> None:
        code = rank.reap()
        self._guard.remove(rank.pid)
        del self._alive[rank.rank]
        if code - 128 in rank.peer_signals:
            code = (
                ExitCode.RETRY
            )  # ended by this supervisor after the loss of a peer: not the cause
        self._codes[rank.rank] = int(code)
        if code in _AGREED_CODES or (self._kill_at is not None and code == ExitCode.RETRY):
            return
        self._group.died(rank.rank, int(code), others=bool(self._alive))
        self._begin_end()

    def _begin_end(self) -> None:
        if self._kill_at is None:
            self._term_at = time.monotonic() + _PEER_EXIT_GRACE_S
            self._kill_at = self._term_at + self._grace_s

    def _end_peers(self, now: float) -> None:
        """After a rank has died: SIGTERM, time to leave a collective, SIGKILL."""
        if self._term_at is not None and now >= self._term_at:
            self._term_at = None
            for peer in self._alive.values():
                peer.peer_signals.add(signal.SIGTERM)
                peer.send(signal.SIGTERM)
        if self._kill_at is None or now < self._kill_at:
            return
        for peer in self._alive.values():
            peer.peer_signals.add(signal.SIGKILL)
            peer.kill()
        if self._alive and not self._kill_reported and now >= self._kill_at + _KILL_REPORT_AFTER_S:
            self._kill_reported = True
            ranks = ", ".join(
                f"{rank.rank} (state {rank.state()})" for rank in self._alive.values()
            )
            self._output.report(
                f"rank {ranks} does not exit after SIGKILL: the kernel waits for a disk, network storage or "
                "a GPU; waiting"
            )

    def _read(self, rank: RankProcess) -> None:
        try:
            data = os.read(rank.output, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: the other side of a pseudo-terminal is closed
            data = b""
        if data:
            self._output.feed(rank.rank, data)
        else:
            self._close_output(rank)

    def _close_output(self, rank: RankProcess) -> None:
        del self._open[rank.output]
        self._loop.forget(rank.output)
        os.close(rank.output)

    def _close(self) -> None:
        for rank in self._alive.values():
            rank.reap()
        for rank in list(self._open.values()):
            self._close_output(rank)
