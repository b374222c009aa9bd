"""The job of a supervisor, and the resources with which it runs its node's part of the job."""

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
    """What to run on this node and the limits of restarting it."""

    command: Sequence[str]  # of one rank
    folder: RunFolder  # events, logs and stop requests of the run
    topology: NodeTopology
    start: str  # LMSCALE_START, or host-pid-time
    by_hand: bool
    max_restarts: int
    env: Mapping[str, str]
    fresh: bool = (
        False  # first start of a submission by a person: the restart budget starts at zero
    )
    deadline: float | None = None  # LMSCALE_DEADLINE, unix seconds: ask the ranks to save then
    stage: Sequence[str] | None = None  # command that fills the cache of this node before its ranks
    unhealthy: Sequence[str] = ()  # reasons why no rank should run on this node
    finished_message: str = ""  # not empty: the run is complete, nothing is started
    stall_limits: StallLimits = field(default_factory=StallLimits)
    grace_s: float = 15.0  # time for the peers of a dead rank to leave a collective
    restart_delay_s: float = 1.0  # before the first restart; doubles with each one without progress
    rendezvous_timeout_s: float = 300.0  # for all nodes to connect

    @property
    def host(self) -> str:
        """The name of this node: that of the scheduler where there is one."""
        return self.env.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True, slots=True)
class SupervisorContext:
    """The job and the open resources of this supervisor."""

    job: SupervisorJob
    loop: EventLoop
    output: Output
    signals: Signals
    guard: Guard
    terminal: (
        int | None
    )  # descriptor of the user's terminal; rank 0's pseudo-terminal copies its size
