"""The side of a node that is not node 0: it tells, and does as it is told."""

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.supervisor.channel import Channel
from launcher.supervisor.loop import Loop
from launcher.supervisor.signals import Signals
from launcher.supervisor.stall import Pace
from launcher.supervisor.team import BEAT_S, End, Examine, Order, Round, Stop, lost


@dataclass(frozen=True, slots=True)
class Leave:
    """The end of it, the same on all nodes."""

    code: int
    words: str


class Guest:
    """See Team; and what `follow` needs besides."""

    busy = False  # node 0 waits for all nodes, the others only for node 0

    def __init__(self, channel: Channel, loop: Loop, signals: Signals) -> None:
        self._channel = channel
        self._loop = loop
        self._signals = signals
        self._orders: list[Order] = []
        self._decisions: list[Round | Leave] = []
        self._beat_s = -BEAT_S
        self.lost = ""  # how node 0 was lost

    def take(self) -> list[Order]:
        """See Team."""
        self._hear()
        orders, self._orders = self._orders, []
        return orders

    def tick(self, pace: Pace | None) -> None:
        """See Team."""
        if self._loop.awake_s - self._beat_s >= BEAT_S:
            self._beat_s = self._loop.awake_s
            self._channel.send("beat", pace=pace and pace.as_json())

    def died(self, rank: int, code: int, *, others: bool) -> None:
        """See Team."""
        self._channel.send("died", rank=rank, code=code)

    def stop(self, number: signal.Signals) -> None:
        """See Team."""
        self._channel.send("stop", number=int(number))

    def stack(self, rank: int, text: str) -> None:
        """See Team."""
        self._channel.send("stack", rank=rank, text=text)

    def ended(self, codes: Mapping[int, int]) -> None:
        """All that ran here in this round has ended."""
        self._channel.send("ended", codes={str(rank): code for rank, code in codes.items()})

    def decision(self) -> Round | Leave | None:
        """What node 0 has decided on; None: nothing yet."""
        self._hear()
        return self._decisions.pop(0) if self._decisions else None

    def close(self) -> None:
        """Part."""
        self._channel.close()

    def _hear(self) -> None:
        for message in self._channel.take():
            match message["kind"]:
                case "go":
                    # What was ordered in an earlier round must not end this one.
                    self._orders.clear()
                    one = Round(message["what"], message["start"], message["port"])
                    self._decisions.append(one)
                case "leave":
                    self._decisions.append(Leave(message["code"], message["words"]))
                    self._orders.append(End())
                case "end":
                    self._orders.append(End())
                case "stop":
                    number = signal.Signals(message["number"])
                    if self._signals.is_new(number):
                        self._orders.append(Stop(number))
                case "examine":
                    self._orders.append(Examine(message["rank"]))
        leaves = any(isinstance(one, Leave) for one in self._decisions)
        if not self.lost and not leaves and (why := lost(self._channel)):
            self.lost = why
            self._channel.close()
            self._orders.append(End())
