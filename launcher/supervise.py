"""The supervisor behind `lmscale train`: starts the ranks of this host, and starts them again.

One thread, so that forking is safe and the ranks' death signal is tied to the process. Nothing that it
starts outlives it, whichever way it ends.
"""

import ctypes
import itertools
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.guard import Guard
from launcher.output import Output
from launcher.signals import Signals
from launcher.spawn import Place, RankProcess, free_port, port_is_taken, spawn
from launcher.watch import Ended, Watch, describe
from lmscale.errors import ExitCode, LmscaleError, decisive
from lmscale.run.budget import starts_since_progress
from lmscale.run.events import EventLog, read_events
from lmscale.run.folder import RunFolder
from lmscale.run.hold import begin
from lmscale.run.lines import readable_lines

_PR_SET_CHILD_SUBREAPER = 36
_PORTS_TRIED = 4
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """What to run, how often at most, and where it is written down."""

    command: Sequence[str]  # of a rank
    folder: RunFolder
    place: Place
    start: str  # LMSCALE_START, or host-pid-time
    by_hand: bool
    max_restarts: int
    env: Mapping[str, str]
    grace_s: float = 15.0  # for peers of a dead rank to leave a collective
    pause_s: float = 1.0  # before the first restart; doubles with each that brought no progress


def supervise(job: Job, *, terminal: int = 2) -> int:
    """Run the job to its end and return the exit code that speaks for all ranks of this host.

    Call it from the main thread of a process without other threads. Raises ConfigError when somebody
    else is training in the folder.
    """
    in_place = os.isatty(terminal)
    output = Output(terminal, in_place=in_place)
    # Orphans of the ranks become children of this process instead of init's, and can be ended.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with Signals() as signals, Guard() as guard:
        supervisor = _Supervisor(job, output, signals, guard, terminal if in_place else None)
        try:
            return supervisor.run()
        finally:
            output.close()


class _Supervisor:
    def __init__(
        self, job: Job, output: Output, signals: Signals, guard: Guard, terminal: int | None
    ) -> None:
        self._job = job
        self._output = output
        self._signals = signals
        self._guard = guard
        self._terminal = terminal

    def run(self) -> int:
        """Start, and start again while it makes sense."""
        job = self._job
        if not job.by_hand and job.folder.stop.exists():
            self._output.say(f"stopped by `lmscale stop`: remove {job.folder.stop} to go on")
            return ExitCode.DONE  # any other code would make a scheduler try again
        for count in itertools.count():
            start = f"{job.start}.{count}" if count else job.start
            by_hand = job.by_hand and count == 0
            events = begin(job.folder, start, by_hand=by_hand, ranks=job.place.num_ranks)
            try:
                ended = self._one_start(start, events)
                code = decisive(ended.codes.values())
                if not ended.stop_requested and self._goes_on(code):
                    self._tell(events, "restart", code, ended)
                    if self._pause(events):
                        continue
                self._tell(events, "exit", code, ended)
                return code
            finally:
                events.close()
        raise AssertionError("unreachable: the loop above only returns")

    def _one_start(self, start: str, events: EventLog) -> Ended:
        """Run all ranks once; again with another port where somebody took ours before they met."""
        for attempt in range(_PORTS_TRIED):
            port = free_port()
            ended = self._ranks(start, port, events)
            lost_port = (
                self._job.place.master is None
                and decisive(ended.codes.values()) == ExitCode.RETRY
                and not ended.stop_requested
                and not _has_attempt(events.path)
                and port_is_taken(port)
            )
            if not lost_port or attempt == _PORTS_TRIED - 1:
                return ended
            self._output.say(f"another process took port {port}: trying another one")
        raise AssertionError("unreachable: the loop above always returns")

    def _ranks(self, start: str, port: int, events: EventLog) -> Ended:
        job, ranks = self._job, list[RankProcess]()
        self._output.open_logs(job.folder.logs, events.path.stem, job.place.ranks)
        try:
            for rank in job.place.ranks:
                env = job.place.environment(job.env, rank=rank, port=port, start=start)
                terminal = self._terminal if rank == 0 else None
                ranks.append(spawn(job.command, env, rank=rank, terminal=terminal))
                self._guard.add(ranks[-1].pid)
            watch = Watch(
                ranks,
                folder=job.folder,
                events=events,
                output=self._output,
                signals=self._signals,
                guard=self._guard,
                grace_s=job.grace_s,
            )
            return watch.until_the_end()
        finally:
            for one in ranks:
                if one.process.returncode is None:
                    one.reap()
            end_strays(spare={self._guard.pid})

    def _goes_on(self, code: int) -> bool:
        """Whether to start again; says why not where a user might expect it."""
        job = self._job
        if not (code in (ExitCode.RETRY, ExitCode.BUG) or code > 128) or job.folder.stop.exists():
            return False
        vain = starts_since_progress(read_events(job.folder))
        if vain >= job.max_restarts:
            self._output.say(
                f"{describe(code)}; not started again: {vain} restarts since the newest checkpoint, "
                f"cluster.max_restarts={job.max_restarts}. The same command goes on from there"
            )
            return False
        self._output.say(
            f"{describe(code)}; starting again, restart {vain + 1} of at most {job.max_restarts} "
            "without a newer checkpoint"
        )
        return True

    def _pause(self, events: EventLog) -> bool:
        """Wait before a restart; False when a stop was requested meanwhile."""
        vain = starts_since_progress(read_events(self._job.folder))
        until = time.monotonic() + min(self._job.pause_s * 2**vain, _LONGEST_PAUSE_S)
        while True:
            if self._signals.take() or self._job.folder.stop.exists():
                return False
            if time.monotonic() >= until:
                return True
            with suppress(OSError):
                events.beat()
            time.sleep(min(0.1, self._job.pause_s))

    def _tell(self, events: EventLog, kind: str, code: int, ended: Ended) -> None:
        try:
            events.write(kind, code=code, reason=describe(code), codes=ended.codes)
        except LmscaleError as error:  # a full disk must not hide how the ranks ended
            self._output.say(str(error))


def _has_attempt(path: Path) -> bool:
    return any(event["kind"] == "attempt" for event in readable_lines(path))


def end_strays(*, spare: set[int]) -> None:
    """Kill and reap every other child of this process: what ranks started outside of their groups."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for _ in range(100):  # killing one hands its own children over to us
        try:
            pids = {int(pid) for pid in children.read_text().split()} - spare
        except OSError:  # a kernel without this file
            return
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
