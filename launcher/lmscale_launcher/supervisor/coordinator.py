"""Node 0's side of the protocol: it receives the reports of all nodes, decides, and sends orders.

It is also the only writer of events and of RUN/status.json.
"""

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
from lmscale.run_folder.rank_progress import STEPPING
from lmscale.run_folder.status_file import StatusWriter, WrittenState
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.messages import Message
from lmscale_launcher.supervisor.output import Output, describe_exit
from lmscale_launcher.supervisor.protocol import (
    BEAT_S,
    Channel,
    Order,
    Round,
    RoundEnd,
    StackRequest,
    StopOrder,
    loss_reason,
)
from lmscale_launcher.supervisor.signals import Signals
from lmscale_launcher.supervisor.stall import StepPace, Suspect, find_stall

_LEAVE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class NodeState:
    """The state of another node."""

    number: int
    host: str
    channel: Channel
    pace: StepPace | None = None
    running: bool = False  # it has not reported the end of this round yet
    lost: bool = False


@dataclass(frozen=True, slots=True)
class StalledRank:
    """The rank that blocks the job."""

    suspect: Suspect
    node: int
    seconds: float


class Coordinator:
    """The supervisor group as node 0 sees it, with or without other nodes."""

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
        self._status: StatusWriter | None = None
        self._stepping = False  # a rank of this start has begun a step
        self._orders: list[Order] = []
        self._heartbeat_s = self._beat_s = -run_events.BEAT_S
        self._ending = False
        self._stuck: StalledRank | None = None
        self._reported_rank: int | None = (
            None  # a stuck rank that was reported; its death is not reported again
        )
        self.codes: dict[int, int] = {}  # of this round, by rank
        self.stop_requested = False
        self._stop_reason = ""
        self.lost = ""  # which node is lost, and why

    @property
    def busy(self) -> bool:
        """Whether another node has not ended this round yet."""
        return any(node.running for node in self._nodes.values())

    def record(self, events: EventLog | None) -> None:
        """Write events, heartbeats and the status of this start from now on; None ends this."""
        self._events = events
        self._status = StatusWriter(self._folder, events.start) if events is not None else None
        self._stepping = False
        self.report_status("starting")

    def report_status(
        self, state: WrittenState, *, step: int | None = None, reason: str = ""
    ) -> None:
        """Write the state of the run to RUN/status.json; at most every 10 s where nothing has changed."""
        if self._status is not None:
            self._status.update(state, step=step, reason=reason)

    def go(self, this_round: Round) -> None:
        """Begin a round on all nodes."""
        self._orders.clear()
        self._ending, self._stuck, self._reported_rank, self.codes = False, None, None, {}
        for node in self._nodes.values():
            node.running, node.pace = not node.lost, None
            node.channel.send(
                "go", what=this_round.kind, start=this_round.start, port=this_round.port
            )

    def leave(self, code: int, reason: str) -> None:
        """Order all other nodes to exit with this code, and wait at most 5 s until they have."""
        for node in self._nodes.values():
            node.channel.send("leave", code=int(code), words=reason)
        deadline = time.monotonic() + _LEAVE_TIMEOUT_S
        while any(node.channel.open for node in self._nodes.values()):
            if time.monotonic() >= deadline:
                break
            self._loop.turn(0.2)
        for node in self._nodes.values():
            node.channel.close()

    def take(self) -> list[Order]:
        """Orders for the ranks of this node, after the reports of the other nodes."""
        for node in self._nodes.values():
            for message in node.channel.take():
                self._on_message(node, message)
            if not node.lost and (reason := loss_reason(node.channel)):
                self._lose(node, reason)
        orders, self._orders = self._orders, []
        return orders

    def tick(self, pace: StepPace | None) -> None:
        """Write heartbeats, look for stop requests, and check the pace of all nodes for a stall."""
        now_s = self._loop.awake_s
        if now_s - self._heartbeat_s >= run_events.BEAT_S and self._events is not None:
            self._heartbeat_s = now_s
            with contextlib.suppress(OSError):  # the next one may succeed
                self._events.beat()
        self._check_requests()
        self._report_progress(pace)
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            for node in self._nodes.values():
                node.channel.send("beat")
            self._check_stall(pace)

    def _report_progress(self, pace: StepPace | None) -> None:
        # Ranks of mpirun share no progress with this process; their rank 0 writes the status itself.
        if pace is None:
            return
        suspect = pace.suspect
        self._stepping |= suspect.phase in STEPPING
        steps_done = suspect.step - 1 if suspect.phase in STEPPING else suspect.step
        if self.stop_requested:
            self.report_status("saving", step=steps_done, reason=self._stop_reason)
        elif self._stepping:
            self.report_status("running", step=steps_done)
        else:
            self.report_status("starting")

    def died(self, rank: int, code: int, *, others: bool) -> None:
        """Handle the death of a rank of node 0."""
        self._died(0, rank, code, others=others or self.busy)

    def stop(self, number: signal.Signals) -> None:
        """Handle a request to save and stop that has arrived at node 0."""
        self._forward_stop(number, source=0)

    def stack(self, rank: int, text: str) -> None:
        """Report the stack of the stuck rank, of whichever node."""
        stuck = self._stuck
        if stuck is None or stuck.suspect.rank != rank:
            return
        self._reported_rank = rank
        suspect, node = stuck.suspect, self.hosts[stuck.node]
        reason = suspect.in_words(node=self._node_name(stuck.node), seconds=stuck.seconds)
        stack = text.rstrip() or "(the process did not write it)"
        self._output.report(f"{reason}. Its stack:\n{stack}")
        self.write_event(
            "stuck", rank=rank, node=node, number=stuck.node, step=suspect.step,
            phase=suspect.phase, seconds=stuck.seconds, reason=reason, stack=text,
        )  # fmt: skip

    def write_event(self, kind: str, **fields: Any) -> None:
        """Write an event. A full disk is only reported, because it must not hide how the ranks ended."""
        if self._events is None:
            return
        try:
            self._events.write(kind, **fields)
        except LmscaleError as error:
            self._output.report(str(error))

    def _on_message(self, node: NodeState, message: Message) -> None:
        match message["kind"]:
            case "beat":
                node.pace = message.get("pace")
            case "died":
                self._died(node.number, message["rank"], message["code"], others=True)
            case "stop" if self._signals.is_new(number := signal.Signals(message["number"])):
                self._output.report(f"{number.name} on {node.host}: saving and stopping")
                self._forward_stop(number, source=node.number)
            case "stack":
                self.stack(message["rank"], message["text"])
            case "ended":
                node.running, node.pace = False, None
                self.codes |= message["codes"]

    def _forward_stop(self, number: signal.Signals, *, source: int) -> None:
        self.stop_requested = True
        self._stop_reason = self._stop_reason or f"stop requested by {number.name}"
        for node in self._nodes.values():
            if node.number != source:
                node.channel.send("stop", number=int(number))
        if source:
            self._orders.append(StopOrder(number))

    def _check_requests(self) -> None:
        """Request a stop for RUN/stop, which any host that shares the folder can write, and for the deadline."""
        if self.stop_requested:
            return
        if self._stop_file_exists():
            self._stop_reason = "stop requested"
            self._output.report(f"{self._folder.stop} exists: saving and stopping")
        elif self._deadline is not None and time.time() >= self._deadline:
            self._stop_reason = "the time limit of the job is near"
            self._output.report("the time of this job is nearly over: saving and stopping")
        else:
            return
        self._forward_stop(signal.SIGTERM, source=0)
        self._orders.append(StopOrder(signal.SIGTERM))

    def _stop_file_exists(self) -> bool:
        try:
            return self._folder.stop.exists()
        except OSError:  # a stale handle or a server that restarts must not end running ranks
            return False

    def _died(self, number: int, rank: int, code: int, *, others: bool) -> None:
        first = not self._ending
        if not first and code == ExitCode.RETRY:
            return  # it ended because it had lost a peer
        if rank != self._reported_rank:
            consequence = ": ending the others" if first and others else ""
            node = f" on {self._node_name(number)}" if self._nodes else ""
            self._output.report(f"rank {rank}{node} has ended ({describe_exit(code)}){consequence}")
            self.write_event(
                "died", rank=rank, node=self.hosts[number], number=number, code=code,
                reason=describe_exit(code),
            )  # fmt: skip
        if first:
            self._end_all(except_node=number)

    def _lose(self, node: NodeState, reason: str) -> None:
        node.channel.close()
        node.running, node.pace, node.lost = False, None, True
        self.lost = f"node {node.number} ({node.host}) is lost: {reason}"
        self._output.report(f"{self.lost}; ending the ranks of the others")
        self.write_event("lost_node", node=node.host, number=node.number, reason=reason)
        self._end_all(except_node=node.number)

    def _end_all(self, *, except_node: int) -> None:
        self._ending = True
        for node in self._nodes.values():
            if node.number != except_node:
                node.channel.send("end")
        if except_node:
            self._orders.append(RoundEnd())

    def _check_stall(self, own_pace: StepPace | None) -> None:
        running = [node for node in self._nodes.values() if node.running]
        if self._ending or self._stuck is not None or any(node.pace is None for node in running):
            return
        paces = {0: own_pace, **{node.number: node.pace for node in running}}
        with_ranks = {number: pace for number, pace in paces.items() if pace is not None}
        if (stall := find_stall(with_ranks.values())) is None:
            return
        suspect, seconds = stall
        number = next(n for n, pace in with_ranks.items() if pace.suspect.rank == suspect.rank)
        self._stuck = StalledRank(suspect, number, seconds)
        if number:
            self._nodes[number].channel.send("examine", rank=suspect.rank)
        else:
            self._orders.append(StackRequest(suspect.rank))

    def _node_name(self, number: int) -> str:
        """A node for messages; empty where there is only one."""
        return f"{self.hosts[number]} (node {number})" if self._nodes else ""
