"""The side of a node that is not node 0: it tells, and does as it is told.

A node that is not node 0: comes to the meeting, runs each round and leaves with the code of all.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from lmscale.base.errors import ExitCode, decisive
from lmscale_launcher.supervisor import node_round as crew
from lmscale_launcher.supervisor.context import SupervisorContext
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.protocol import (
    BEAT_S,
    Channel,
    Order,
    Round,
    RoundEnd,
    StackRequest,
    StopOrder,
    lost,
    parted,
)
from lmscale_launcher.supervisor.rendezvous import find
from lmscale_launcher.supervisor.signals import Signals
from lmscale_launcher.supervisor.stall import StepPace


@dataclass(frozen=True, slots=True)
class Leave:
    """The end of it, the same on all nodes."""

    code: int
    words: str


class Member:
    """See Team; and what `follow` needs besides."""

    busy = False  # node 0 waits for all nodes, the others only for node 0

    def __init__(self, channel: Channel, loop: EventLoop, signals: Signals) -> None:
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

    def tick(self, pace: StepPace | None) -> None:
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
                    self._orders.append(RoundEnd())
                case "end":
                    self._orders.append(RoundEnd())
                case "stop":
                    number = signal.Signals(message["number"])
                    if self._signals.is_new(number):
                        self._orders.append(StopOrder(number))
                case "examine":
                    self._orders.append(StackRequest(message["rank"]))
        leaves = any(isinstance(one, Leave) for one in self._decisions)
        if not self.lost and not leaves and (why := lost(self._channel)):
            self.lost = why
            self._channel.close()
            self._orders.append(RoundEnd())


_TURN_S = 0.5


def follow(station: SupervisorContext) -> int:
    """Do as node 0 says. Raises RetryableError where it is not found."""
    channel = find(station.job, station.loop, stopped=lambda: bool(station.signals.take()))
    if channel is None:
        return ExitCode.SAVED  # stopped on request before there was anything to save
    guest = Member(channel, station.loop, station.signals)
    try:
        return _rounds(station, guest)
    finally:
        guest.close()


def _rounds(station: SupervisorContext, guest: Member) -> int:
    codes: dict[int, int] = {}
    while True:
        one = guest.decision()
        if isinstance(one, Leave):
            if one.words:
                station.output.say(one.words)
            return one.code
        if guest.lost:
            station.output.say(
                f"node 0 is lost: {guest.lost}. This node leaves, to be started again"
            )
            return parted(decisive(codes.values()))
        if one is not None:
            codes = crew.run(station, one, guest)
            guest.ended(codes)
            continue
        station.loop.turn(_TURN_S)
        for number in station.signals.take():
            guest.stop(number)
        guest.tick(None)
