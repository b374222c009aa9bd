"""What a supervisor is asked to do, as one value.

What a supervisor has on its node, as one value.

The supervisor behind `lmscale train`: starts the ranks of all nodes, and starts them again.

One thread, so that forking is safe and the ranks' death signal is tied to the process. Nothing that it
starts outlives it, whichever way it ends.
"""

import itertools
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from lmscale.base.errors import ExitCode, LmscaleError, RetryableError, decisive
from lmscale.base.fs import atomic_write, storage_errors
from lmscale.base.listener import listen
from lmscale.base.proc import adopt_orphans
from lmscale.run_folder.bad_nodes import BadNode, read_bad_nodes, write_bad_nodes
from lmscale.run_folder.events import read_events, starts_since_progress
from lmscale.run_folder.liveness import begin
from lmscale_launcher.supervisor import node_round as crew
from lmscale_launcher.supervisor.context import SupervisorContext, SupervisorJob
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.guard import Guard
from lmscale_launcher.supervisor.member import follow
from lmscale_launcher.supervisor.output import Output, describe
from lmscale_launcher.supervisor.protocol import Round, What, parted
from lmscale_launcher.supervisor.rendezvous import Rendezvous, StartupFailure, meet
from lmscale_launcher.supervisor.signals import Signals

__all__ = ["SupervisorJob", "supervise"]

_LONGEST_PAUSE_S = 60.0
_EXCUSE_S = 60.0  # for other nodes to hear that there is nothing to wait for


def supervise(job: SupervisorJob, *, terminal: int = 2) -> int:
    """Run the job to its end and return the exit code that speaks for all ranks of all nodes.

    Call it from the main thread of a process without other threads. Raises ConfigError when somebody
    else is training in the folder.
    """
    with _stationed(job, terminal) as station:
        return follow(station) if job.place.node else _lead(station)


def excuse(job: SupervisorJob, error: LmscaleError, *, terminal: int = 2) -> int:
    """Part from the other nodes, since this one cannot start: nobody shall wait for it in vain.

    What is wrong on node 0 is wrong with the run; on another node alone, with that node. Raises the
    error again where node 0 is not found to say so.
    """
    told = replace(job, unfit=(str(error),), meeting_s=_EXCUSE_S)
    with _stationed(told, terminal) as station:
        if job.place.node:
            with suppress(RetryableError):
                return follow(station)
            raise error
        with suppress(RetryableError):
            meet(station).leader.leave(error.exit_code, str(error))
    raise error


@contextmanager
def _stationed(job: SupervisorJob, terminal: int) -> Iterator[SupervisorContext]:
    several = job.place.nodes > 1
    in_place = os.isatty(terminal) and not several
    output = Output(terminal, in_place=in_place, host=job.host if several else "")
    # Orphans of the ranks become children of this process instead of init's, and can be ended.
    adopt_orphans()
    with Signals() as signals, Guard() as guard, EventLoop() as loop:
        loop.watch(signals.descriptor, signals.drain)
        try:
            yield SupervisorContext(
                job, loop, output, signals, guard, terminal if in_place else None
            )
        finally:
            output.close()


def _lead(station: SupervisorContext) -> int:
    """Node 0: nothing to do, or a meeting and starts; and a code that all nodes leave with."""
    nothing = _nothing_to_do(station.job)
    if nothing and station.job.place.nodes == 1:
        station.output.say(nothing)
        return ExitCode.DONE
    met = meet(station)
    try:
        if nothing:
            station.output.say(nothing)
            met.leader.leave(ExitCode.DONE, "")
            return ExitCode.DONE
        with storage_errors(f"supervising {station.job.folder.path}"):
            return _Starts(station, met).run()
    except LmscaleError as error:
        met.leader.leave(error.exit_code, "")
        raise


def _nothing_to_do(job: SupervisorJob) -> str:
    """Why this start is none; exit code 0, for any other would make a scheduler try again."""
    if job.by_hand or not job.folder.stop.exists():
        return job.finished
    with storage_errors(f"reading {job.folder.stop}"):
        why = job.folder.stop.read_text(errors="replace").strip()
    return (
        f"stopped by {why or '`lmscale stop`'}: `lmscale resume`, or removing {job.folder.stop}, "
        "lets it go on"
    )


class _Starts:
    """Node 0's policy: one start after the other, while it makes sense."""

    def __init__(self, station: SupervisorContext, met: Rendezvous) -> None:
        self._station = station
        self._job = station.job
        self._met = met
        self._leader = met.leader
        self._output = station.output
        self._staged = station.job.stage is None

    def run(self) -> int:
        """Start, and start again."""
        job = self._job
        bad = read_bad_nodes(job.folder)
        for count in itertools.count():
            start = f"{job.start}.{count}" if count else job.start
            events = begin(
                job.folder,
                start,
                by_hand=job.by_hand and count == 0,
                fresh=job.fresh and count == 0,
                ranks=job.place.num_ranks * job.place.nodes,
                nodes=self._leader.hosts,
            )
            self._leader.record(events)
            try:
                trouble = self._trouble() if count == 0 else None
                if trouble is not None:
                    return self._leave(trouble.code, f"{describe(trouble.code)}: {trouble.words}")
                code = self._one_start(start)
                if not self._leader.stop_asked and self._goes_on(code, bad):
                    self._tell("restart", code, describe(code))
                    if self._pause():
                        continue
                    code = parted(code) if self._leader.lost else code
                return self._leave(code, describe(code))
            finally:
                self._leader.record(None)
                events.close()
        raise AssertionError("unreachable: the loop above only returns")

    def _trouble(self) -> StartupFailure | None:
        """Why not even one start should be made, after the events that tell of it."""
        met = self._met
        for number in met.missing:
            self._leader.tell("lost_node", node="", number=number, reason="it did not come")
        for host, reasons in met.unfit.items():
            self._leader.tell("bad_node", node=host, reasons=reasons)
        write_bad_nodes(
            self._job.folder, {host: "\n".join(found) for host, found in met.unfit.items()}
        )
        trouble = met.trouble or self._spent()
        if trouble is not None:
            self._output.say(trouble.words)
        return trouble

    def _spent(self) -> StartupFailure | None:
        """Whether the starts before this one have used up the budget without a word: with their nodes."""
        job = self._job
        vain = starts_since_progress(read_events(job.folder))
        # A scheduler that has started again once has decided so: max_restarts=0 is about our own restarts.
        if job.by_hand or vain <= max(job.max_restarts, 1):
            return None
        words = (
            f"not started: {vain - 1} restarts since the newest checkpoint, the last without a word; "
            f"cluster.max_restarts={job.max_restarts}"
        )
        return StartupFailure(ExitCode.RETRY, self._give_up(words))

    def _one_start(self, start: str) -> int:
        """Stage the data, unless that is done, and run all ranks once."""
        if not self._staged:
            code = self._round("stage", start)
            if code != ExitCode.DONE and not (self._leader.stop_asked and code > 128):
                return code
            self._staged = True
        if not self._may_start():  # ranks would die of a signal that comes before Python does
            return ExitCode.RETRY if self._leader.lost else ExitCode.SAVED
        with _listening() as listener:
            return self._round("ranks", start, listener)

    def _round(self, what: What, start: str, listener: socket.socket | None = None) -> int:
        one = Round(what, start, listener.getsockname()[1] if listener is not None else 0)
        self._leader.go(one)
        own = crew.run(self._station, one, self._leader, listener)
        self._leader.codes |= own
        code = decisive(self._leader.codes.values())
        return parted(code) if self._leader.lost else code

    def _goes_on(self, code: int, bad: Collection[BadNode]) -> bool:
        """Whether to start again; says why not where a user might expect it."""
        job = self._job
        if not (code in (ExitCode.RETRY, ExitCode.BUG) or code > 128) or job.folder.stop.exists():
            return False
        if self._leader.lost:
            self._output.say(f"{self._leader.lost}. All nodes leave, to be started again")
            return False
        news = sorted({node.host for node in read_bad_nodes(job.folder) if node not in bad})
        if news and job.place.nodes > 1 and not job.by_hand:
            self._output.say(
                f"{', '.join(news)}: named in {job.folder.bad_nodes}. All nodes leave, to be started without it"
            )
            return False
        vain = starts_since_progress(read_events(job.folder))
        if vain >= job.max_restarts:
            words = (
                f"{describe(code)}; not started again: {vain} restarts since the newest checkpoint, "
                f"cluster.max_restarts={job.max_restarts}"
            )
            self._output.say(self._give_up(words))
            return False
        self._output.say(
            f"{describe(code)}; starting again, restart {vain + 1} of at most {job.max_restarts} "
            "without a newer checkpoint"
        )
        return True

    def _give_up(self, words: str) -> str:
        """See that no scheduler starts it again, where one has started it; what to tell the user."""
        job = self._job
        if job.by_hand:
            return f"{words}. The same command goes on from there"
        with storage_errors(f"writing {job.folder.stop}"):
            atomic_write(job.folder.stop, f"{words}\n".encode())
        return f"{words}. `lmscale resume {job.folder.path}` goes on from there"

    def _pause(self) -> bool:
        """Wait before a restart; False when a stop was requested or a node lost meanwhile."""
        job = self._job
        vain = starts_since_progress(read_events(job.folder))
        until = time.monotonic() + min(job.pause_s * 2 ** min(vain, 16), _LONGEST_PAUSE_S)
        while self._may_start():
            if time.monotonic() >= until:
                return True
            self._station.loop.turn(min(0.1, job.pause_s))
        return False

    def _may_start(self) -> bool:
        """Hear of requests and of lost nodes while no rank runs; False when there are any."""
        leader = self._leader
        for number in self._station.signals.take():
            leader.stop(number)
        leader.take()
        leader.tick(None)
        return not (leader.stop_asked or leader.lost)

    def _leave(self, code: int, reason: str) -> int:
        """All nodes leave with this code; the last word in the events is node 0's."""
        words = self._met.trouble.words if self._met.trouble is not None else ""
        self._leader.leave(code, words)
        self._tell("exit", code, reason)
        return code

    def _tell(self, kind: str, code: int, reason: str) -> None:
        self._leader.tell(kind, code=int(code), reason=reason, codes=self._leader.codes)


def _listening() -> socket.socket:
    try:
        return listen()
    except OSError as error:
        raise RetryableError(
            f"no port is to be had for the ranks ({error}); see `ss -ltn` and `ulimit -n`"
        ) from error
