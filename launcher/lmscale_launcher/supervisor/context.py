"""What a supervisor has on its node, as one value."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.guard import Guard
from lmscale_launcher.supervisor.output import Output
from lmscale_launcher.supervisor.rank_process import NodeTopology
from lmscale_launcher.supervisor.signals import Signals
from lmscale_launcher.supervisor.stall import StallLimits


@dataclass(frozen=True, slots=True)
class SupervisorJob:
    """What to run, how often at most, and where it is written down."""

    command: Sequence[str]  # of a rank
    folder: RunFolder
    place: NodeTopology
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
    patience: StallLimits = field(default_factory=StallLimits)
    grace_s: float = 15.0  # for peers of a dead rank to leave a collective
    pause_s: float = 1.0  # before the first restart; doubles with each that brought no progress
    meeting_s: float = 300.0  # for all nodes to come

    @property
    def host(self) -> str:
        """This node's name, as its scheduler knows it where there is one."""
        return self.env.get("SLURMD_NODENAME") or _host_name()


def _host_name() -> str:
    return socket.gethostname()


@dataclass(frozen=True, slots=True)
class SupervisorContext:
    """A job, and the means to run this node's part of it."""

    job: SupervisorJob
    loop: EventLoop
    output: Output
    signals: Signals
    guard: Guard
    terminal: int | None  # one whose size rank 0's own terminal follows
