"""Node 0's side of the supervisors' talk: hears of all ranks, and tells all nodes what follows from it."""

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmscale.base.errors import ExitCode, LmscaleError
from lmscale.run_folder import events as run_events
from lmscale.run_folder.events import EventLog
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.output import Output, describe
from lmscale_launcher.supervisor.protocol import (
    BEAT_S,
    Channel,
    Message,
    Order,
    Round,
    RoundEnd,
    StackRequest,
    StopOrder,
    lost,
)
from lmscale_launcher.supervisor.signals import Signals
from lmscale_launcher.supervisor.stall import StepPace, Suspect, stuck

_FAREWELL_S = 5.0


@dataclass(slots=True)
class NodeState:
    """Another node, as node 0 knows it."""

    number: int
    host: str
    channel: Channel
    pace: StepPace | None = None
    running: bool = False  # it has not yet reported the end of this round
    gone: bool = False


@dataclass(frozen=True, slots=True)
class StalledRank:
    """A rank that was found to hold the job up."""

    suspect: Suspect
    node: int
    seconds: float


class Coordinator:
    """See Team; and what `supervise` needs besides. Without other nodes it is only about its own ranks."""

    def __init__(
        self,
        host: str,
        nodes: Sequence[NodeState],
        *,
        loop: EventLoop,
        output: Output,
        signals: Signals,
        folder: RunFolder,
        deadline: float | None,
    ) -> None:
        self._nodes = {node.number: node for node in nodes}
        self.hosts = [host, *(node.host for node in nodes)]
        self._loop = loop
        self._output = output
        self._signals = signals
        self._folder = folder
        self._deadline = deadline
        self._events: EventLog | None = None
        self._orders: list[Order] = []
        self._heartbeat_s = self._beat_s = -run_events.BEAT_S
        self._ending = False
        self._stuck: StalledRank | None = None
        self._named_stuck: int | None = None  # its rank, once it was said: its death is no news
        self.codes: dict[int, int] = {}  # of this round, by rank
        self.stop_asked = False
        self.lost = ""  # which node, and how

    @property
    def busy(self) -> bool:
        """See Team."""
        return any(node.running for node in self._nodes.values())

    def record(self, events: EventLog | None) -> None:
        """Write down what happens from now on, and beat."""
        self._events = events

    def go(self, one: Round) -> None:
        """Begin a round on all nodes."""
        self._orders.clear()
        self._ending, self._stuck, self._named_stuck, self.codes = False, None, None, {}
        for node in self._nodes.values():
            node.running, node.pace = not node.gone, None
            node.channel.send("go", what=one.what, start=one.start, port=one.port)

    def leave(self, code: int, words: str) -> None:
        """Let all other nodes leave with this code, and wait until they have."""
        for node in self._nodes.values():
            node.channel.send("leave", code=int(code), words=words)
        until = time.monotonic() + _FAREWELL_S
        while any(node.channel.open for node in self._nodes.values()):
            if time.monotonic() >= until:
                break
            self._loop.turn(0.2)
        for node in self._nodes.values():
            node.channel.close()

    def take(self) -> list[Order]:
        """See Team."""
        for node in self._nodes.values():
            for message in node.channel.take():
                self._on_message(node, message)
            if not node.gone and (why := lost(node.channel)):
                self._lose(node, why)
        orders, self._orders = self._orders, []
        return orders

    def tick(self, pace: StepPace | None) -> None:
        """See Team."""
        now_s = self._loop.awake_s
        if now_s - self._heartbeat_s >= run_events.BEAT_S and self._events is not None:
            self._heartbeat_s = now_s
            with contextlib.suppress(OSError):  # the next one may succeed
                self._events.beat()
        self._look_for_requests()
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            for node in self._nodes.values():
                node.channel.send("beat")
            self._look_for_stalls(pace)

    def died(self, rank: int, code: int, *, others: bool) -> None:
        """See Team."""
        self._died(0, rank, code, others=others or self.busy)

    def stop(self, number: signal.Signals) -> None:
        """See Team."""
        self._pass_on_stop(number, source=0)

    def stack(self, rank: int, text: str) -> None:
        """See Team."""
        found = self._stuck
        if found is None or found.suspect.rank != rank:
            return
        self._named_stuck = rank
        node = self.hosts[found.node]
        words = found.suspect.in_words(node=self._named(found.node), seconds=found.seconds)
        self._output.say(f"{words}. Its stack:\n{text.rstrip() or '(it did not answer)'}")
        self.tell(
            "stuck", rank=rank, node=node, number=found.node, step=found.suspect.step,
            phase=found.suspect.phase, seconds=found.seconds, reason=words, stack=text,
        )  # fmt: skip

    def tell(self, kind: str, **fields: Any) -> None:
        """Write an event. A full disk must not hide how the ranks ended."""
        if self._events is None:
            return
        try:
            self._events.write(kind, **fields)
        except LmscaleError as error:
            self._output.say(str(error))

    def _on_message(self, node: NodeState, message: Message) -> None:
        match message["kind"]:
            case "beat":
                node.pace = StepPace.from_json(message["pace"]) if message["pace"] else None
            case "died":
                self._died(node.number, message["rank"], message["code"], others=True)
            case "stop" if self._signals.is_new(number := signal.Signals(message["number"])):
                self._output.say(f"{number.name} on {node.host}: saving and stopping")
                self._pass_on_stop(number, source=node.number)
            case "stack":
                self.stack(message["rank"], message["text"])
            case "ended":
                node.running, node.pace = False, None
                self.codes |= {int(rank): code for rank, code in message["codes"].items()}

    def _pass_on_stop(self, number: signal.Signals, *, source: int) -> None:
        self.stop_asked = True
        for node in self._nodes.values():
            if node.number != source:
                node.channel.send("stop", number=int(number))
        if source:
            self._orders.append(StopOrder(number))

    def _look_for_requests(self) -> None:
        """RUN/stop, which works from any host that shares the folder, and the end of the job's time."""
        if self.stop_asked:
            return
        if self._stop_stands():
            self._output.say(f"{self._folder.stop} has appeared: saving and stopping")
        elif self._deadline is not None and time.time() >= self._deadline:
            self._output.say("the time of this job is nearly over: saving and stopping")
        else:
            return
        self._pass_on_stop(signal.SIGTERM, source=0)
        self._orders.append(StopOrder(signal.SIGTERM))

    def _stop_stands(self) -> bool:
        try:
            return self._folder.stop.exists()
        except OSError:  # a stale handle, a server that restarts: no reason to end ranks that run
            return False

    def _died(self, number: int, rank: int, code: int, *, others: bool) -> None:
        first = not self._ending
        if not first and code == ExitCode.RETRY:
            return  # it has lost a peer, and says so
        if rank != self._named_stuck:
            then = ": ending the others" if first and others else ""
            where = self._named(number)
            self._output.say(
                f"rank {rank}{' on ' + where if where else ''} has ended ({describe(code)}){then}"
            )
            self.tell(
                "died", rank=rank, node=self.hosts[number], number=number, code=code,
                reason=describe(code),
            )  # fmt: skip
        if first:
            self._end_all(besides=number)

    def _lose(self, node: NodeState, why: str) -> None:
        node.channel.close()
        node.running, node.pace, node.gone = False, None, True
        self.lost = f"node {node.number} ({node.host}) is lost: {why}"
        self._output.say(f"{self.lost}; ending the ranks of the others")
        self.tell("lost_node", node=node.host, number=node.number, reason=why)
        self._end_all(besides=node.number)

    def _end_all(self, *, besides: int) -> None:
        self._ending = True
        for node in self._nodes.values():
            if node.number != besides:
                node.channel.send("end")
        if besides:
            self._orders.append(RoundEnd())

    def _look_for_stalls(self, own: StepPace | None) -> None:
        others = [node for node in self._nodes.values() if node.running]
        if self._ending or self._stuck is not None or any(one.pace is None for one in others):
            return
        paces = {0: own, **{node.number: node.pace for node in others}}
        known = {number: pace for number, pace in paces.items() if pace is not None}
        if (found := stuck(known.values())) is None:
            return
        suspect, seconds = found
        rank = suspect.rank
        number = next(n for n, pace in known.items() if pace.suspect.rank == rank)
        self._stuck = StalledRank(suspect, number, seconds)
        if number:
            self._nodes[number].channel.send("examine", rank=rank)
        else:
            self._orders.append(StackRequest(rank))

    def _named(self, number: int) -> str:
        """A node in words, where there are several."""
        return f"{self.hosts[number]} (node {number})" if self._nodes else ""
