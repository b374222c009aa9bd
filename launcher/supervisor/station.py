"""What a supervisor has on its node, as one value."""

from dataclasses import dataclass

from launcher.supervisor.guard import Guard
from launcher.supervisor.job import Job
from launcher.supervisor.loop import Loop
from launcher.supervisor.output import Output
from launcher.supervisor.signals import Signals


@dataclass(frozen=True, slots=True)
class Station:
    """A job, and the means to run this node's part of it."""

    job: Job
    loop: Loop
    output: Output
    signals: Signals
    guard: Guard
    terminal: int | None  # one whose size rank 0's own terminal follows
