"""What a supervisor is asked to do, as one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.supervisor.spawn import Place
from launcher.supervisor.stall import Patience
from lmscale.run.folder import RunFolder


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
    fresh: bool = (
        False  # the first start of a submission that a person has made: the budget counts anew
    )
    deadline: float | None = None  # LMSCALE_DEADLINE, unix seconds: ask the ranks to save then
    stage: Sequence[str] | None = None  # what to run on this node before its ranks
    unfit: Sequence[str] = ()  # why no rank should run on this node
    finished: str = ""  # words for a run that has nothing left to do
    patience: Patience = field(default_factory=Patience)
    grace_s: float = 15.0  # for peers of a dead rank to leave a collective
    pause_s: float = 1.0  # before the first restart; doubles with each that brought no progress
    meeting_s: float = 300.0  # for all nodes to come

    @property
    def host(self) -> str:
        """This node's name, as its scheduler knows it where there is one."""
        return self.env.get("SLURMD_NODENAME") or _host_name()


def _host_name() -> str:
    import socket

    return socket.gethostname()
