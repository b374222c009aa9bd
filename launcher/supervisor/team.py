"""What the supervisors of one start tell each other, seen from one node: node 0 leads, the others follow.

Requests, deaths, stalls and codes go to node 0, which alone decides and alone writes events; its decisions
come back as orders to end, stop or look at a node's own ranks. A node by itself leads nobody.
"""

import signal
from dataclasses import dataclass
from typing import Literal, Protocol

from launcher.supervisor.channel import Channel
from launcher.supervisor.stall import Pace
from lmscale.errors import FINAL, ExitCode

BEAT_S = 2.0
# Of a process whose host still answers, see channel.DEAD_S: a file server that fails over holds it up for minutes.
SILENT_S = 120.0
What = Literal["stage", "ranks"]


@dataclass(frozen=True, slots=True)
class Stop:
    """Ask the ranks of this node to save and stop."""

    number: signal.Signals


@dataclass(frozen=True, slots=True)
class End:
    """End the ranks of this node: one elsewhere has died, or the nodes have lost each other."""


@dataclass(frozen=True, slots=True)
class Examine:
    """This rank of this node is stuck: take its stack and kill it."""

    rank: int


Order = Stop | End | Examine


@dataclass(frozen=True, slots=True)
class Round:
    """What every node is to run now."""

    what: What
    start: str
    port: int  # of the ranks' own rendezvous


class Team(Protocol):
    """What the loop around a node's own ranks needs of the others."""

    @property
    def busy(self) -> bool:
        """Whether another node has yet to end this round."""
        ...

    def take(self) -> list[Order]:
        """What to do to the own ranks."""
        ...

    def tick(self, pace: Pace | None) -> None:
        """Be heard, and notice who is not; `pace` of the own ranks, None without any."""
        ...

    def died(self, rank: int, code: int, *, others: bool) -> None:
        """A rank of this node has ended by itself; `others`: of this node still run."""
        ...

    def stop(self, number: signal.Signals) -> None:
        """Somebody has asked this node to save and stop."""
        ...

    def stack(self, rank: int, text: str) -> None:
        """Where a stuck rank of this node stands."""
        ...


def lost(channel: Channel) -> str:
    """How the other side was lost; empty while it is there."""
    if not channel.open:
        return channel.why
    if channel.silent_s > SILENT_S:
        return f"nothing was heard of it for {channel.silent_s:.0f} s"
    return ""


def parted(code: int) -> int:
    """The code of a start that has lost a node: to be started again, unless a rank knows better."""
    return code if code in FINAL else ExitCode.RETRY
