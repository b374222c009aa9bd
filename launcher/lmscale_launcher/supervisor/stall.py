"""Stall detection: is the job stuck, and which rank is the cause? Pure, except for reading the progress of ranks.

The ranks of a job advance in lockstep: a rank that hangs blocks all others, and the peers that wait for it make
no progress either. So the job is stuck only when no rank at all has advanced for the limit. The cause is a
process that the kernel has stopped or that waits for a disk, else the rank with the least progress.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lmscale.run_folder.rank_progress import (
    PHASES,
    STEPPING,
    Phase,
    ProgressReading,
    read_beat,
)
from lmscale_launcher.supervisor.rank_process import RankProcess

# Starting, loading, a first step (compilers), validation and saves may report no progress for long. A hang in
# a collective ends earlier by itself, after 600 s; this limit is for hangs outside of collectives.
SLOW_S = 1800.0
# A stopped process never continues by itself, in any phase.
STOPPED_S = 15.0
# The automatic limit: 50 times the longest step so far, at most SLOW_S, but at least twice the longest step.
_LONGEST_STEPS = 50.0
_MIN_LONGEST_STEPS = 2.0
_STATES = {"T": "stopped", "D": "waiting for a disk or a file server"}


@dataclass(frozen=True, slots=True)
class StallLimits:
    """How long the job may make no progress."""

    fixed_s: float | None = None  # cluster.stall_limit
    min_s: float = 30.0  # lower bound of the automatic limit

    def limit_s(self, beat: ProgressReading) -> float:
        """The limit for a rank with this progress."""
        # One step that contained an hour of suspension must not raise the limit to days.
        automatic_s = max(
            min(_LONGEST_STEPS * beat.longest_s, SLOW_S), _MIN_LONGEST_STEPS * beat.longest_s
        )
        limit = self.fixed_s or max(self.min_s, automatic_s)
        return limit if beat.phase in STEPPING and beat.warm else max(limit, SLOW_S)


@dataclass(frozen=True, slots=True)
class Suspect:
    """The rank with the least progress."""

    rank: int
    step: int
    phase: Phase
    state: str  # process state, as in /proc/PID/stat
    num_alike: int = 1  # ranks with exactly this progress

    @property
    def order_key(self) -> tuple[bool, int, int, int]:
        """The suspect with the smallest key is the cause."""
        return (self.state not in _STATES, self.step, PHASES.index(self.phase), self.rank)

    def in_words(self, *, node: str, seconds: float) -> str:
        """A line for people."""
        location = f" on {node}" if node else ""
        state = (
            f" (process state {self.state}: {_STATES[self.state]})" if self.state in _STATES else ""
        )
        alike = f"; {self.num_alike} ranks are in this phase" if self.num_alike > 1 else ""
        return (
            f"rank {self.rank}{location} is stuck in {self.phase} of step {self.step}{state}: "
            f"no rank has made progress for {seconds:.0f} s{alike}"
        )


@dataclass(frozen=True, slots=True)
class StepPace:
    """Progress of the ranks of one node; each node sends it to node 0 every two seconds."""

    quiet_s: float  # since one of the ranks advanced
    limit_s: float  # how long that may be in their present phase
    suspect: Suspect

    def as_json(self) -> dict[str, Any]:
        """As JSON, for node 0."""
        return asdict(self)


class ProgressReadings:
    """Reads the progress of this node's ranks from the memory that they share."""

    def __init__(self, limits: StallLimits, *, now_s: float) -> None:
        self._limits = limits
        self._counts: dict[int, int] = {}
        self._advanced_s = now_s

    def pace(self, ranks: Sequence[RankProcess], *, now_s: float) -> StepPace | None:
        """The pace of living ranks. None where they share no memory. `now_s` is EventLoop.awake_s."""
        beats = {
            rank.rank: read_beat(rank.progress_fd)
            for rank in ranks
            if rank.progress_fd is not None
        }  # fmt: skip
        if not beats:
            return None
        counts = {rank: beat.count for rank, beat in beats.items()}
        if counts != self._counts:
            self._counts, self._advanced_s = counts, now_s
        suspects = [
            Suspect(rank.rank, beat.step, beat.phase, rank.state())
            for rank in ranks
            if (beat := beats.get(rank.rank)) is not None
        ]
        return StepPace(
            quiet_s=now_s - self._advanced_s,
            limit_s=max(self._limits.limit_s(beat) for beat in beats.values()),
            suspect=least_progress(suspects),
        )


def least_progress(suspects: Iterable[Suspect]) -> Suspect:
    """The suspect that is the cause, with the number of ranks that have the same progress."""
    candidates = list(suspects)
    first = min(candidates, key=lambda suspect: suspect.order_key)
    alike = [suspect for suspect in candidates if suspect.order_key[:-1] == first.order_key[:-1]]
    num_alike = sum(suspect.num_alike for suspect in alike)
    return Suspect(first.rank, first.step, first.phase, first.state, num_alike)


def find_stall(paces: Iterable[StepPace]) -> tuple[Suspect, float] | None:
    """The rank that blocks the job and the seconds without progress; None while the job advances.

    `paces` has one entry per node that runs ranks.
    """
    nodes = list(paces)
    if not nodes:
        return None
    quiet_s = min(pace.quiet_s for pace in nodes)
    suspect = least_progress(pace.suspect for pace in nodes)
    limit_s = max(pace.limit_s for pace in nodes)
    if suspect.state == "T":
        limit_s = min(limit_s, STOPPED_S)
    return (suspect, quiet_s) if quiet_s >= limit_s else None
