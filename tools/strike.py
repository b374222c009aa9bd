"""Carries out one trial: starts the command, kills what the trial says, starts it again; sees who is left over."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kills import IN_PLACE, Kill, Trial
from small_jobs import Started, start

from tests.support.jobs import Job, descendants, processes_of, rank_pids

KILLED = 128 + signal.SIGKILL
GONE_S, HANG_S = 20.0, 150.0


@dataclass(frozen=True)
class Usual:
    """How long things take in an undisturbed run."""

    steps: int
    start_s: float  # from the command to the first attempt
    finish_s: float  # from the last step to the end


class Struck:
    """One trial under way: starts, kills, and what was seen."""

    def __init__(self, job: Job, trial: Trial, usual: Usual) -> None:
        self.job, self.trial, self.usual = job, trial, usual
        self.problems: list[str] = []
        self.steps: list[int] = []  # lines that stood at each kill
        self.moments: list[str] = []  # of the kills that hit
        self.torn: list[bool] = []  # whether the kill left a checkpoint unfinished
        self.recovery_s: float | None = None
        self._chooser = random.Random(trial.chooser)
        self._seen: set[int] = set()  # ranks of earlier starts
        self._struck_at = 0.0
        self._before: set[str] = set()  # unfinished checkpoints before the save that is waited for
        self._inode: int | None = (
            None  # of metrics.jsonl when this start began: it is cut by renaming
        )

    def run(self) -> None:
        in_place = self.trial.victim == IN_PLACE
        started = start(self.job)
        for kill in self.trial.kills:
            if not self._strike(started, kill) or in_place:
                continue
            self._see_end(started, killed=True)
            started = start(self.job)
        since = self._struck_at if in_place and self.moments else started.since
        reached = self.steps[-1] if self.steps else 0
        self._wait_for_step(started, min(self.usual.steps, reached + 1))
        self.recovery_s = time.monotonic() - since if self.moments else None
        self._see_end(started, killed=False)

    def _strike(self, started: Started, kill: Kill) -> bool:
        """Wait for the moment, then kill. False: the start ended before."""
        if not self._wait_for(started, kill):
            return False
        time.sleep(kill.pause_s)
        pids = self._chosen(started.process.pid)
        self.steps.append(self._count())
        self._struck_at = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.moments.append(kill.moment)
        self.torn.append(kill.moment == "save" and bool(self._unpublished() - self._before))
        with contextlib.suppress(FileNotFoundError):
            self._inode = (self.job.run_dir / "metrics.jsonl").stat().st_ino
        return True

    def _chosen(self, supervisor: int) -> list[int]:
        match self.trial.victim:
            case "supervisor":
                return [supervisor]
            case "all":
                return [supervisor, *descendants(supervisor)]
            case _:
                ranks = self._ranks(supervisor)
                self._seen |= set(ranks)
                return [self._chooser.choice(ranks)] if ranks else []

    def _ranks(self, supervisor: int) -> list[int]:
        """Those of this start: after a restart in place the old ones may still be ending."""
        return [pid for pid in rank_pids(supervisor) if pid not in self._seen]

    def _killable(self, started: Started) -> bool:
        ranks = self.trial.victim not in ("supervisor", "all")
        return not ranks or bool(self._ranks(started.process.pid))

    def _wait_for(self, started: Started, kill: Kill) -> bool:
        match kill.moment:
            case "start-up":
                there = self._wait(started, lambda: self._killable(started), poll_s=0.02)
                seconds = kill.share * self.usual.start_s
                return there and self._sleep(started, seconds, unless=self._fresh)
            case "finish":
                there = self._wait_for_step(started, self.usual.steps)
                return there and self._sleep(started, kill.share * self.usual.finish_s)
        if not self._wait(started, self._fresh):
            return False
        at = kill.at_step(self._count() + 1, self.usual.steps - 1)
        if not self._wait_for_step(started, at):
            return False
        self._before = self._unpublished()
        return kill.moment == "step" or self._wait(
            started, lambda: bool(self._unpublished() - self._before), poll_s=0.001
        )

    def _wait_for_step(self, started: Started, step: int) -> bool:
        return self._wait(started, lambda: self._fresh() and self._count() >= step)

    def _count(self) -> int:
        """Lines in metrics.jsonl, which stand there without gaps while a run goes on."""
        try:
            return (self.job.run_dir / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def _fresh(self) -> bool:
        """metrics.jsonl is this start's: lines that a killed start left are cut by a new file."""
        try:
            return (self.job.run_dir / "metrics.jsonl").stat().st_ino != self._inode
        except FileNotFoundError:
            return False

    def _unpublished(self) -> set[str]:
        return {path.name for path in (self.job.run_dir / "checkpoints").glob("step-*.tmp")}

    def _wait(
        self, started: Started, condition: Callable[[], bool], *, poll_s: float = 0.004
    ) -> bool:
        deadline = time.monotonic() + HANG_S
        while started.process.poll() is None and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(poll_s)
        return False

    def _sleep(
        self, started: Started, seconds: float, *, unless: Callable[[], bool] = lambda: False
    ) -> bool:
        end = time.monotonic() + seconds
        self._wait(started, lambda: time.monotonic() >= end or unless())
        return started.process.poll() is None

    def _see_end(self, started: Started, *, killed: bool) -> None:
        """Its exit code, and that no process outlived it."""
        try:
            code = started.process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            self.problems.append(f"start {started.number}: still running after {HANG_S:.0f} s")
            kill_all(self.job.folder)
            code = started.process.wait()
        wanted = {0}
        if killed:
            wanted = {KILLED if self.trial.victim == "rank" else -signal.SIGKILL}
            if self.moments[-1] == "finish":  # it may have been done already
                wanted.add(0)
        if code not in wanted:
            self.problems.append(
                f"start {started.number}: exit code {code}, not {wanted}; see {started.log}"
            )
        deadline = time.monotonic() + GONE_S
        while (left := processes_of(self.job.folder)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if left:
            self.problems.append(f"start {started.number}: processes {left} outlived it")
            kill_all(self.job.folder)


def kill_all(folder: Path) -> None:
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def shared_memory() -> set[str]:
    """But for semaphores of Python's multiprocessing, which lmscale does not use and other programs do."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def abandoned(names: set[str], *, wait_s: float = 5.0) -> set[str]:
    """Those still in /dev/shm that no living process has open: other programs' memory is theirs."""
    deadline = time.monotonic() + wait_s
    while True:
        left = {name for name in names & shared_memory() if not _is_open(f"/dev/shm/{name}")}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _is_open(path: str) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path in (process / "maps").read_text():
                return True
            if any(os.readlink(fd) == path for fd in (process / "fd").iterdir()):
                return True
    return False
