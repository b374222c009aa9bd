"""The supervisor of a node other than node 0: it connects to node 0, runs each round and exits with node 0's code."""

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from lmscale.base.errors import ExitCode, decisive
from lmscale_launcher.supervisor.context import SupervisorContext
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.node_round import run_round
from lmscale_launcher.supervisor.protocol import (
    BEAT_S,
    Channel,
    Order,
    Round,
    RoundEnd,
    StackRequest,
    StopOrder,
    code_after_lost_node,
    loss_reason,
)
from lmscale_launcher.supervisor.rendezvous import connect
from lmscale_launcher.supervisor.signals import Signals
from lmscale_launcher.supervisor.stall import StepPace

_TURN_S = 0.5


def run_member(context: SupervisorContext) -> int:
    """Run the rounds that node 0 orders; the exit code. Raises RetryableError when node 0 is not found."""
    channel = connect(context.job, context.loop, stopped=lambda: bool(context.signals.take()))
    if channel is None:
        return ExitCode.SAVED  # stopped on request before there was anything to save
    member = Member(channel, context.loop, context.signals)
    try:
        return _run_rounds(context, member)
    finally:
        member.close()


def _run_rounds(context: SupervisorContext, member: "Member") -> int:
    codes: dict[int, int] = {}
    while True:
        decision = member.decision()
        if isinstance(decision, Leave):
            if decision.reason:
                context.output.report(decision.reason)
            return decision.code
        if member.lost:
            context.output.report(
                f"node 0 is lost: {member.lost}. This node exits with 75 (retry), to be started again"
            )
            return code_after_lost_node(decisive(codes.values()))
        if decision is not None:
            codes = run_round(context, decision, member)
            member.ended(codes)
            continue
        context.loop.turn(_TURN_S)
        for number in context.signals.take():
            member.stop(number)
        member.tick(None)


@dataclass(frozen=True, slots=True)
class Leave:
    """The decision of node 0 that all nodes exit with this code."""

    code: int
    reason: str


class Member:
    """The supervisor group as a node other than node 0 sees it: one connection to node 0."""

    busy = False  # only node 0 waits for other nodes

    def __init__(self, channel: Channel, loop: EventLoop, signals: Signals) -> None:
        self._channel = channel
        self._loop = loop
        self._signals = signals
        self._orders: list[Order] = []
        self._decisions: list[Round | Leave] = []
        self._beat_s = -BEAT_S
        self.lost = ""  # why the connection to node 0 is lost

    def take(self) -> list[Order]:
        """Orders for the ranks of this node since the last call."""
        self._receive()
        orders, self._orders = self._orders, []
        return orders

    def tick(self, pace: StepPace | None) -> None:
        """Send the pace of this node's ranks to node 0 every two seconds."""
        if self._loop.awake_s - self._beat_s >= BEAT_S:
            self._beat_s = self._loop.awake_s
            self._channel.send("beat", pace=pace and pace.as_json())

    def died(self, rank: int, code: int, *, others: bool) -> None:
        """Report to node 0 that a rank of this node has ended by itself."""
        self._channel.send("died", rank=rank, code=code)

    def stop(self, number: signal.Signals) -> None:
        """Report to node 0 a request to save and stop."""
        self._channel.send("stop", number=int(number))

    def stack(self, rank: int, text: str) -> None:
        """Send the stack of a stuck rank to node 0."""
        self._channel.send("stack", rank=rank, text=text)

    def ended(self, codes: Mapping[int, int]) -> None:
        """Report to node 0 that all processes of this round have ended here."""
        self._channel.send("ended", codes={str(rank): code for rank, code in codes.items()})

    def decision(self) -> Round | Leave | None:
        """The next decision of node 0; None when there is none yet."""
        self._receive()
        return self._decisions.pop(0) if self._decisions else None

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _receive(self) -> None:
        for message in self._channel.take():
            match message["kind"]:
                case "go":
                    # Orders of an earlier round must not end this one.
                    self._orders.clear()
                    self._decisions.append(
                        Round(message["what"], message["start"], message["port"])
                    )
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
        leaving = any(isinstance(decision, Leave) for decision in self._decisions)
        if not self.lost and not leaving and (reason := loss_reason(self._channel)):
            self.lost = reason
            self._channel.close()
            self._orders.append(RoundEnd())
