"""How the supervisors of several nodes find each other: node 0 listens, the others come and greet.

The port follows from the job's id, so other programs, or another job's supervisors, may have it: node 0 takes the
next free one of eight, the others try them all until somebody answers who is of the same start.

Node 0 before the first start: who has come, and whether these nodes can train together.
"""

import contextlib
import platform
import resource
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import lmscale
from lmscale.base.errors import ExitCode, RetryableError
from lmscale.base.listener import listen
from lmscale_launcher.supervisor.context import SupervisorContext, SupervisorJob
from lmscale_launcher.supervisor.coordinator import Coordinator, NodeState
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.protocol import BEAT_S, Channel, Message

PORTS = 8
_ANSWER_S = 3.0  # for a greeting to come, or its answer
_DIAL_S = 1.0
_AGAIN_S = 0.5
_SKEW_S = 5.0


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """What a node says of itself."""

    start: str
    node: int
    nodes: int
    ranks: int  # on it
    host: str
    lmscale: str
    python: str
    clock: float
    unfit: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: SupervisorJob) -> Self:
        """This node's."""
        place = job.place
        return cls(
            job.start, place.node, place.nodes, place.num_ranks, job.host,
            lmscale.__version__, platform.python_version(), time.time(), tuple(job.unfit),
        )  # fmt: skip

    @classmethod
    def read(cls, message: Message) -> Self | None:
        """Another node's; None for other words."""
        try:
            body: dict[str, Any] = {name: message[name] for name in cls.__slots__}
            return cls(**{**body, "unfit": tuple(body["unfit"])})
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class MemberConnection:
    """A node that has come."""

    greeting: JoinRequest
    channel: Channel
    skew_s: float  # how far its clock is ahead of ours


class RendezvousServer:
    """Node 0's side: waits for the others."""

    def __init__(self, job: SupervisorJob, loop: EventLoop) -> None:
        assert job.place.master is not None
        self._own = JoinRequest.of(job)
        self._loop = loop
        self.until = time.monotonic() + job.meeting_s
        self._arrived: dict[Channel, float] = {}  # and when, by the loop's clock
        self.guests: dict[int, MemberConnection] = {}
        self.stop_asked = False
        self._beat_s = -BEAT_S
        _make_room(job.place.nodes)
        host, port = split(job.place.master)
        self._listener = _listen(port)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._listener.setblocking(False)
        loop.watch(self._listener.fileno(), self._accept)

    @property
    def missing(self) -> list[int]:
        """Nodes that have not come yet."""
        return [node for node in range(1, self._own.nodes) if node not in self.guests]

    def look(self) -> None:
        """Greet who has come, and forget who has gone."""
        for channel, since_s in list(self._arrived.items()):
            messages = channel.take()
            if messages:
                del self._arrived[channel]
                channel.put_back(messages[1:])
                self._greet(channel, JoinRequest.read(messages[0]))
            elif not channel.open or self._loop.awake_s - since_s > _ANSWER_S:
                del self._arrived[channel]
                channel.close()
        beats = self._loop.awake_s - self._beat_s >= BEAT_S
        self._beat_s = self._loop.awake_s if beats else self._beat_s
        for number, guest in list(self.guests.items()):
            self.stop_asked |= any(one["kind"] == "stop" for one in guest.channel.take())
            if not guest.channel.open:
                del self.guests[number]  # it may come again
            elif beats:
                guest.channel.send("beat")

    def close(self) -> None:
        """Let nobody else in."""
        self._loop.forget(self._listener.fileno())
        self._listener.close()
        for channel in self._arrived:
            channel.close()

    def _accept(self) -> None:
        # All that wait: thousands of nodes may come in the same second.
        with contextlib.suppress(OSError):  # nobody waits, or there are no descriptors left
            while True:
                channel = Channel(self._listener.accept()[0], self._loop)
                self._arrived[channel] = self._loop.awake_s

    def _greet(self, channel: Channel, theirs: JoinRequest | None) -> None:
        ours = self._own
        known = self.guests.get(theirs.node) if theirs is not None else None
        if (
            theirs is None
            or (theirs.start, theirs.nodes) != (ours.start, ours.nodes)
            or not 0 < theirs.node < ours.nodes
            or (known is not None and known.channel.open and known.greeting.host != theirs.host)
        ):
            channel.send("stranger")
            channel.close()
            return
        if known is not None:
            known.channel.close()  # a node that comes again has given the first connection up
        self.guests[theirs.node] = MemberConnection(theirs, channel, theirs.clock - time.time())
        channel.send("welcome")


def gather(job: SupervisorJob, loop: EventLoop, stopped: Callable[[], bool]) -> RendezvousServer:
    """Wait for all nodes, until a deadline or a request to stop. Raises RetryableError without a port."""
    lobby = RendezvousServer(job, loop)
    while lobby.missing and time.monotonic() < lobby.until and not lobby.stop_asked:
        loop.turn(_AGAIN_S)
        lobby.look()
        lobby.stop_asked |= stopped()
    lobby.close()
    return lobby


def nodes_of(guests: Sequence[MemberConnection]) -> list[NodeState]:
    """The others as node 0 works with them, by number."""
    found = [NodeState(one.greeting.node, one.greeting.host, one.channel) for one in guests]
    return sorted(found, key=lambda node: node.number)


def find(job: SupervisorJob, loop: EventLoop, stopped: Callable[[], bool]) -> Channel | None:
    """The other nodes' side: the connection to node 0. None when stopped. Raises RetryableError."""
    assert job.place.master is not None
    host, first = split(job.place.master)
    until, why = time.monotonic() + job.meeting_s, "nobody has answered"
    while True:
        for port in _ports(first):
            if stopped():
                return None
            try:
                channel = Channel(socket.create_connection((host, port), timeout=_DIAL_S), loop)
            except OSError as error:
                why = str(error) if port == first else why
                continue
            if _is_welcome(channel, job, loop):
                return channel
            why = f"who listens on port {port} is of another start"
        if time.monotonic() >= until:
            raise RetryableError(
                f"node {job.place.node}: node 0 was not found at {host}, ports {first} to "
                f"{first + PORTS - 1}, within {job.meeting_s:.0f} s ({why}). See what its log says, "
                "and whether this host reaches it"
            )
        loop.turn(_AGAIN_S)


def disagreement(own: JoinRequest, guests: Sequence[JoinRequest]) -> str:
    """Why these nodes cannot train together; empty where they can."""
    for other in guests:
        where = f"node {other.node} ({other.host})"
        if other.lmscale != own.lmscale:
            return (
                f"{where} runs lmscale {other.lmscale}, node 0 ({own.host}) {own.lmscale}; install the "
                "same version on all nodes"
            )
        if other.ranks != own.ranks:
            return (
                f"{where} has {other.ranks} ranks, node 0 ({own.host}) {own.ranks}; set "
                "cluster.ranks_per_node, or use nodes that are alike"
            )
    return ""


def cautions(own: JoinRequest, guests: Sequence[MemberConnection]) -> list[str]:
    """What is odd about these nodes, but no reason not to train."""
    found = []
    for one in guests:
        where = f"node {one.greeting.node} ({one.greeting.host})"
        if abs(one.skew_s) > _SKEW_S:
            way = "ahead of" if one.skew_s > 0 else "behind"
            found.append(
                f"the clock of {where} is {abs(one.skew_s):.0f} s {way} that of node 0; times in events and "
                "logs will not fit together: let NTP set it"
            )
        if one.greeting.python != own.python:
            found.append(f"{where} runs Python {one.greeting.python}, node 0 {own.python}")
    return found


def split(master: str) -> tuple[str, int]:
    """Host and port of LMSCALE_MASTER."""
    host, _, port = master.rpartition(":")
    return host.strip("[]"), int(port)


def _make_room(nodes: int) -> None:
    """A descriptor for each node: shells often allow 1024 where the system would allow more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(nodes + 1024, hard) if hard != resource.RLIM_INFINITY else nodes + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _ports(first: int) -> range:
    return range(first, min(first + PORTS, 1 << 16))


def _is_welcome(channel: Channel, job: SupervisorJob, loop: EventLoop) -> bool:
    channel.send("greet", **asdict(JoinRequest.of(job)))
    until_s = loop.awake_s + _ANSWER_S
    while channel.open and loop.awake_s < until_s:
        loop.turn(_AGAIN_S)
        if messages := channel.take():
            # What node 0 has said since belongs to who uses the connection next.
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
        f"node 0 could listen on none of the ports {first} to {first + PORTS - 1} ({error}); end what uses "
        "them, or give LMSCALE_MASTER another port"
    )


_STOPPED = "stopped on request before the ranks had been started"


@dataclass(frozen=True, slots=True)
class StartupFailure:
    """Why nothing can be started: the code to leave with, and why."""

    code: int
    words: str


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """The nodes of this start."""

    leader: Coordinator
    trouble: StartupFailure | None = None
    missing: list[int] = field(default_factory=list)  # node numbers
    unfit: dict[str, tuple[str, ...]] = field(default_factory=dict)  # host -> what is wrong with it


def meet(station: SupervisorContext) -> Rendezvous:
    """Wait for the other nodes, if there are any. Raises RetryableError where none of the ports is free."""
    job = station.job
    own = JoinRequest.of(job)
    if own.nodes == 1:
        unfit = {own.host: own.unfit} if own.unfit else {}
        return Rendezvous(_leader(station, None), _unfit(unfit), unfit=unfit)
    lobby = gather(job, station.loop, stopped=lambda: bool(station.signals.take()))
    guests = [lobby.guests[number] for number in sorted(lobby.guests)]
    greetings = [guest.greeting for guest in guests]
    for caution in cautions(own, guests):
        station.output.say(f"careful: {caution}")
    unfit = {one.host: one.unfit for one in [own, *greetings] if one.unfit}
    trouble = _unfit(unfit)
    if lobby.stop_asked:
        return Rendezvous(
            _leader(station, lobby), StartupFailure(ExitCode.SAVED, _STOPPED), unfit=unfit
        )
    if lobby.missing:
        trouble = _incomplete(job, lobby)
    elif trouble is None and (why := disagreement(own, greetings)):
        trouble = StartupFailure(ExitCode.CONFIG, why)
    return Rendezvous(_leader(station, lobby), trouble, lobby.missing, unfit)


def _leader(station: SupervisorContext, lobby: RendezvousServer | None) -> Coordinator:
    return Coordinator(
        station.job.host,
        nodes_of(list(lobby.guests.values())) if lobby is not None else [],
        loop=station.loop,
        output=station.output,
        signals=station.signals,
        folder=station.job.folder,
        deadline=station.job.deadline,
    )


def _incomplete(job: SupervisorJob, lobby: RendezvousServer) -> StartupFailure:
    numbers = ", ".join(str(number) for number in lobby.missing)
    return StartupFailure(
        ExitCode.RETRY,
        f"node {numbers} of {job.place.nodes} did not come to {lobby.address} within {job.meeting_s:.0f} s; "
        "see what its log says, and whether it reaches that address",
    )


def _unfit(unfit: dict[str, tuple[str, ...]]) -> StartupFailure | None:
    if not unfit:
        return None
    words = "; ".join(f"{host}: {' / '.join(reasons)}" for host, reasons in unfit.items())
    return StartupFailure(ExitCode.RETRY, f"not fit to train: {words}")
