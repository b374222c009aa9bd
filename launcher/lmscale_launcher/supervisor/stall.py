"""When does nothing move any more, and which rank is to blame? Pure, but for reading the ranks' pulses.

Ranks of one job go in step: one that hangs holds all of them up, and the peers that wait for it look just as
idle. So the job is stuck only when no rank at all has moved for the limit, and to blame is a process
that the kernel has stopped, else the rank that is the least far.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from lmscale.run_folder.rank_progress import (
    PHASES,
    STEPPING,
    Phase,
    ProgressReading,
    read_beat,
)
from lmscale_launcher.supervisor.rank_process import RankProcess

# Starting, loading, a first step (compilers), validation and saves may be silent for long, and a hang in them
# that peers wait for ends by itself: collectives give up after 600 s. This is for what they do not see.
SLOW_S = 1800.0


# A stopped process never goes on by itself, whatever it was at.
STOPPED_S = 15.0


_STEPS = 50.0  # as long as the longest step, where that is no more than SLOW_S


_AGAIN = 2.0  # in any case


_STATES = {"T": "stopped", "D": "waiting for a disk or a file server"}


@dataclass(frozen=True, slots=True)
class StallLimits:
    """How long no rank may move."""

    fixed_s: float | None = None  # cluster.stall_limit
    least_s: float = 30.0  # of the automatic limit

    def limit_s(self, beat: ProgressReading) -> float:
        """For a rank that stands there."""
        # One step with an hour of suspension in it shall not buy patience for days.
        usual_s = max(min(_STEPS * beat.longest_s, SLOW_S), _AGAIN * beat.longest_s)
        limit = self.fixed_s or max(self.least_s, usual_s)
        return limit if beat.phase in STEPPING and beat.warm else max(limit, SLOW_S)


@dataclass(frozen=True, slots=True)
class Suspect:
    """The rank that is the least far."""

    rank: int
    step: int
    phase: Phase
    state: str  # the kernel's letter
    alike: int = 1  # ranks that stand exactly there

    @property
    def place(self) -> tuple[bool, int, int, int]:
        """The smallest of a job is to blame."""
        return (self.state not in _STATES, self.step, PHASES.index(self.phase), self.rank)

    def in_words(self, *, node: str, seconds: float) -> str:
        """A line for people."""
        where = f" on {node}" if node else ""
        what = (
            f" (process state {self.state}: {_STATES[self.state]})" if self.state in _STATES else ""
        )
        also = f"; {self.alike} ranks stand there" if self.alike > 1 else ""
        return (
            f"rank {self.rank}{where} is stuck in {self.phase} of step {self.step}{what}: "
            f"no rank has moved for {seconds:.0f} s{also}"
        )


@dataclass(frozen=True, slots=True)
class StepPace:
    """How the ranks of one node get on: what a node tells the others every two seconds."""

    quiet_s: float  # since one of them has moved
    limit_s: float  # how long that may be where they stand
    suspect: Suspect

    def as_json(self) -> dict[str, Any]:
        """For the wire."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Self:
        """From the wire."""
        return cls(body["quiet_s"], body["limit_s"], Suspect(**body["suspect"]))


class ProgressReadings:
    """The pulses of this node's ranks."""

    def __init__(self, patience: StallLimits, *, now_s: float) -> None:
        self._patience = patience
        self._seen: dict[int, int] = {}
        self._moved_s = now_s

    def pace(self, ranks: Sequence[RankProcess], *, now_s: float) -> StepPace | None:
        """Look at those that live. None where they share no memory with us. `now_s`: Loop.awake_s."""
        beats = {
            one.rank: read_beat(one.pulse) for one in ranks if one.pulse is not None
        }  # fmt: skip
        if not beats:
            return None
        counts = {rank: beat.count for rank, beat in beats.items()}
        if counts != self._seen:
            self._seen, self._moved_s = counts, now_s
        suspects = [
            Suspect(one.rank, beat.step, beat.phase, one.state())
            for one in ranks
            if (beat := beats.get(one.rank)) is not None
        ]
        return StepPace(
            quiet_s=now_s - self._moved_s,
            limit_s=max(self._patience.limit_s(beat) for beat in beats.values()),
            suspect=blamed(suspects),
        )


def blamed(suspects: Iterable[Suspect]) -> Suspect:
    """Of some suspects the one to blame, and how many stand where it stands."""
    known = list(suspects)
    worst = min(known, key=lambda one: one.place)
    alike = sum(one.alike for one in known if one.place[:-1] == worst.place[:-1])
    return Suspect(worst.rank, worst.step, worst.phase, worst.state, alike)


def stuck(paces: Iterable[StepPace]) -> tuple[Suspect, float] | None:
    """Who holds the job up and for how many seconds; None while it moves. One pace a node with ranks."""
    known = list(paces)
    if not known:
        return None
    quiet_s = min(pace.quiet_s for pace in known)
    worst = blamed(pace.suspect for pace in known)
    limit_s = max(pace.limit_s for pace in known)
    if worst.state == "T":
        limit_s = min(limit_s, STOPPED_S)
    return (worst, quiet_s) if quiet_s >= limit_s else None
