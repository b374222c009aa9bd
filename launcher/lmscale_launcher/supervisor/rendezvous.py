"""How the supervisors of several nodes connect before the first start, and whether they can train together.

Node 0 listens, the others connect and send a join request. The port follows from the id of the job, so another
program or the supervisors of another job may use it: node 0 takes the next free one of eight, and the others try
all of them until a supervisor of the same start accepts.
"""

import contextlib
import platform
import resource
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Self

import lmscale
from lmscale.base.decoding import RecordError, convert
from lmscale.base.errors import ExitCode, RetryableError
from lmscale.base.listener import listen
from lmscale_launcher.supervisor.context import SupervisorContext, SupervisorJob
from lmscale_launcher.supervisor.coordinator import Coordinator, NodeState
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.messages import Message
from lmscale_launcher.supervisor.protocol import BEAT_S, Channel

PORTS = 8
_ANSWER_TIMEOUT_S = 3.0  # for a join request to arrive, or the answer to it
_CONNECT_TIMEOUT_S = 1.0
_TURN_S = 0.5
_MAX_SKEW_S = 5.0
_STOPPED = "stopped on request before the ranks had been started"


@dataclass(frozen=True, slots=True)
class StartupFailure:
    """Why no rank can be started, and the exit code of all nodes."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The nodes of this start."""

    coordinator: Coordinator
    failure: StartupFailure | None = None
    missing: list[int] = field(default_factory=list)  # numbers of nodes that have not connected
    unhealthy: dict[str, tuple[str, ...]] = field(default_factory=dict)  # host -> reasons


def rendezvous(context: SupervisorContext) -> Rendezvous:
    """Wait for the other nodes, if there are any. Raises RetryableError where no port is free."""
    job = context.job
    own = JoinRequest.of(job)
    if own.nodes == 1:
        unhealthy = {own.host: own.unhealthy} if own.unhealthy else {}
        failure = _unhealthy_failure(unhealthy)
        return Rendezvous(_coordinator(context, None), failure, unhealthy=unhealthy)
    server = wait_for_members(job, context.loop, stopped=lambda: bool(context.signals.take()))
    members = [server.members[number] for number in sorted(server.members)]
    requests = [member.request for member in members]
    for warning in _warnings(own, members):
        context.output.report(f"warning: {warning}")
    unhealthy = {node.host: node.unhealthy for node in [own, *requests] if node.unhealthy}
    failure = _unhealthy_failure(unhealthy)
    coordinator = _coordinator(context, server)
    if server.stop_requested:
        failure = StartupFailure(ExitCode.SAVED, _STOPPED)
        return Rendezvous(coordinator, failure, unhealthy=unhealthy)
    if server.missing:
        failure = _missing_failure(job, server)
    elif failure is None and (reason := _mismatch(own, requests)):
        failure = StartupFailure(ExitCode.CONFIG, reason)
    return Rendezvous(coordinator, failure, server.missing, unhealthy)


def _coordinator(context: SupervisorContext, server: "RendezvousServer | None") -> Coordinator:
    members = server.members.values() if server is not None else ()
    nodes = [NodeState(node.request.node, node.request.host, node.channel) for node in members]
    return Coordinator(
        context.job.host,
        sorted(nodes, key=lambda node: node.number),
        loop=context.loop,
        output=context.output,
        signals=context.signals,
        folder=context.job.folder,
        deadline=context.job.deadline,
    )


def _missing_failure(job: SupervisorJob, server: "RendezvousServer") -> StartupFailure:
    numbers = ", ".join(str(number) for number in server.missing)
    return StartupFailure(
        ExitCode.RETRY,
        f"node {numbers} of {job.topology.nodes} did not connect to {server.address} within "
        f"{job.rendezvous_timeout_s:.0f} s; read its log, and check that it can connect to that address",
    )


def _unhealthy_failure(unhealthy: dict[str, tuple[str, ...]]) -> StartupFailure | None:
    if not unhealthy:
        return None
    nodes = "; ".join(f"{host}: {' / '.join(reasons)}" for host, reasons in unhealthy.items())
    return StartupFailure(ExitCode.RETRY, f"the check of the node failed: {nodes}")


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """What a node sends to node 0 when it connects."""

    start: str
    node: int
    nodes: int
    ranks: int  # of this node
    host: str
    lmscale: str
    python: str
    clock: float
    unhealthy: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: SupervisorJob) -> Self:
        """The request of this node."""
        topology = job.topology
        return cls(
            job.start, topology.node, topology.nodes, topology.num_ranks, job.host,
            lmscale.__version__, platform.python_version(), time.time(), tuple(job.unhealthy),
        )  # fmt: skip

    @classmethod
    def read(cls, message: Message) -> Self | None:
        """The request of another node; None for any other message."""
        try:
            return convert(cls, message, where="greeting of a supervisor")
        except RecordError:
            return None


@dataclass(frozen=True, slots=True)
class MemberConnection:
    """A node that has connected and was accepted."""

    request: JoinRequest
    channel: Channel
    skew_s: float  # its clock minus that of node 0


class RendezvousServer:
    """Node 0's side: accepts the connections of the other nodes."""

    def __init__(self, job: SupervisorJob, loop: EventLoop) -> None:
        assert job.topology.master is not None
        self._own = JoinRequest.of(job)
        self._loop = loop
        self.deadline = time.monotonic() + job.rendezvous_timeout_s
        self._pending: dict[
            Channel, float
        ] = {}  # no request yet -> when connected, by the clock of the loop
        self.members: dict[int, MemberConnection] = {}
        self.stop_requested = False
        self._beat_s = -BEAT_S
        _raise_descriptor_limit(job.topology.nodes)
        host, port = split(job.topology.master)
        self._listener = _listen(port)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._listener.setblocking(False)
        loop.watch(self._listener.fileno(), self._accept)

    @property
    def missing(self) -> list[int]:
        """Numbers of the nodes that have not connected yet."""
        return [node for node in range(1, self._own.nodes) if node not in self.members]

    def update(self) -> None:
        """Answer join requests, drop closed connections and send heartbeats."""
        for channel, since_s in list(self._pending.items()):
            messages = channel.take()
            if messages:
                del self._pending[channel]
                channel.put_back(messages[1:])
                self._answer(channel, JoinRequest.read(messages[0]))
            elif not channel.open or self._loop.awake_s - since_s > _ANSWER_TIMEOUT_S:
                del self._pending[channel]
                channel.close()
        beats = self._loop.awake_s - self._beat_s >= BEAT_S
        self._beat_s = self._loop.awake_s if beats else self._beat_s
        for number, member in list(self.members.items()):
            self.stop_requested |= any(
                message["kind"] == "stop" for message in member.channel.take()
            )
            if not member.channel.open:
                del self.members[number]  # it may connect again
            elif beats:
                member.channel.send("beat")

    def close(self) -> None:
        """Accept no more connections."""
        self._loop.forget(self._listener.fileno())
        self._listener.close()
        for channel in self._pending:
            channel.close()

    def _accept(self) -> None:
        # Thousands of nodes may connect in the same second, so all waiting connections are accepted.
        with contextlib.suppress(OSError):  # none is waiting, or no descriptor is left
            while True:
                channel = Channel(self._listener.accept()[0], self._loop)
                self._pending[channel] = self._loop.awake_s

    def _answer(self, channel: Channel, request: JoinRequest | None) -> None:
        own = self._own
        earlier = self.members.get(request.node) if request is not None else None
        if (
            request is None
            or (request.start, request.nodes) != (own.start, own.nodes)
            or not 0 < request.node < own.nodes
            or (
                earlier is not None
                and earlier.channel.open
                and earlier.request.host != request.host
            )
        ):
            channel.send("stranger")
            channel.close()
            return
        if earlier is not None:
            earlier.channel.close()  # a node that connects again has given the first connection up
        skew_s = request.clock - time.time()
        self.members[request.node] = MemberConnection(request, channel, skew_s)
        channel.send("welcome")


def wait_for_members(
    job: SupervisorJob, loop: EventLoop, stopped: Callable[[], bool]
) -> RendezvousServer:
    """Wait for all nodes, until a deadline or a request to stop. Raises RetryableError without a port."""
    server = RendezvousServer(job, loop)
    while server.missing and time.monotonic() < server.deadline and not server.stop_requested:
        loop.turn(_TURN_S)
        server.update()
        server.stop_requested |= stopped()
    server.close()
    return server


def connect(job: SupervisorJob, loop: EventLoop, stopped: Callable[[], bool]) -> Channel | None:
    """Connect a node to node 0. None when stopped on request. Raises RetryableError at the deadline."""
    assert job.topology.master is not None
    host, first = split(job.topology.master)
    deadline, reason = time.monotonic() + job.rendezvous_timeout_s, "no answer"
    while True:
        for port in _ports(first):
            if stopped():
                return None
            try:
                connection = socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S)
            except OSError as error:
                reason = str(error) if port == first else reason
                continue
            channel = Channel(connection, loop)
            if _is_accepted(channel, job, loop):
                return channel
            reason = f"the program that listens on port {port} belongs to another start"
        if time.monotonic() >= deadline:
            raise RetryableError(
                f"node {job.topology.node}: node 0 was not found at {host}, ports {first} to "
                f"{first + PORTS - 1}, within {job.rendezvous_timeout_s:.0f} s ({reason}). Read the log of "
                "node 0, and check that this host can connect to it"
            )
        loop.turn(_TURN_S)


def _mismatch(own: JoinRequest, others: Sequence[JoinRequest]) -> str:
    """Why these nodes cannot train together; empty where they can."""
    for other in others:
        name = f"node {other.node} ({other.host})"
        if other.lmscale != own.lmscale:
            return (
                f"{name} runs lmscale {other.lmscale}, node 0 ({own.host}) {own.lmscale}; install the "
                "same version on all nodes"
            )
        if other.ranks != own.ranks:
            return (
                f"{name} has {other.ranks} ranks, node 0 ({own.host}) {own.ranks}; set "
                "cluster.ranks_per_node, or use nodes with equal numbers of GPUs"
            )
    return ""


def _warnings(own: JoinRequest, members: Sequence[MemberConnection]) -> list[str]:
    """Differences between the nodes that do not prevent training."""
    warnings = []
    for member in members:
        name = f"node {member.request.node} ({member.request.host})"
        if abs(member.skew_s) > _MAX_SKEW_S:
            direction = "ahead of" if member.skew_s > 0 else "behind"
            warnings.append(
                f"the clock of {name} is {abs(member.skew_s):.0f} s {direction} that of node 0, so times in "
                "events and logs will not agree: set the clocks with NTP"
            )
        if member.request.python != own.python:
            warnings.append(f"{name} runs Python {member.request.python}, node 0 {own.python}")
    return warnings


def split(master: str) -> tuple[str, int]:
    """Host and port of LMSCALE_MASTER."""
    host, _, port = master.rpartition(":")
    return host.strip("[]"), int(port)


def _raise_descriptor_limit(nodes: int) -> None:
    """Allow one descriptor per node: the limit is often 1024 where the system allows more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(nodes + 1024, hard) if hard != resource.RLIM_INFINITY else nodes + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _ports(first: int) -> range:
    return range(first, min(first + PORTS, 1 << 16))


def _is_accepted(channel: Channel, job: SupervisorJob, loop: EventLoop) -> bool:
    channel.send("greet", **asdict(JoinRequest.of(job)))
    deadline_s = loop.awake_s + _ANSWER_TIMEOUT_S
    while channel.open and loop.awake_s < deadline_s:
        loop.turn(_TURN_S)
        if messages := channel.take():
            # Later messages of node 0 are for the rounds.
            channel.put_back(messages[1:])
            if messages[0]["kind"] == "welcome":
                return True
            break
    channel.close()
    return False


def _listen(first: int) -> socket.socket:
    error: OSError | None = None
    for port in _ports(first):
        try:
            return listen(port)
        except OSError as failed:
            error = failed
    raise RetryableError(
        f"node 0 cannot listen on any of the ports {first} to {first + PORTS - 1} ({error}); end the programs "
        "that use them, or set another port in LMSCALE_MASTER"
    )
