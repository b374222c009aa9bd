"""A connection between two supervisors: JSON objects, a line each. Nothing here ever waits.

What the supervisors of one start tell each other, seen from one node: node 0 leads, the others follow.

Requests, deaths, stalls and codes go to node 0, which alone decides and alone writes events; its decisions
come back as orders to end, stop or look at a node's own ranks. A node by itself leads nobody.
"""

import contextlib
import json
import signal
import socket
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lmscale.base.errors import FINAL, ExitCode
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.stall import StepPace

Message = dict[str, Any]
_READ_BYTES = 1 << 18
# Whoever sends longer lines, or does not read, is none of ours.
_LONGEST_LINE = 1 << 24
_MOST_UNSENT = 1 << 26
# The kernel of the other host answers even while the process there waits for a hung file server: if it does not
# for this long, the host or the network is gone.
DEAD_S = 15
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_S // 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_S // 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_S),
)


class Channel:
    """One side of the connection. Messages collect until they are taken."""

    def __init__(self, connection: socket.socket, loop: EventLoop) -> None:
        connection.setblocking(False)
        for level, option, value in _OPTIONS:
            with contextlib.suppress(OSError):
                connection.setsockopt(level, option, value)
        self._socket = connection
        self._loop = loop
        self._received = bytearray()
        self._unsent = bytearray()
        self._messages: list[Message] = []
        self._full = False  # the other side does not keep up: wait for room
        self.open = True
        self.why = ""  # it is no longer open
        self.heard_s = loop.awake_s  # when something last came, by the loop's clock
        loop.watch(connection.fileno(), self._on_read)

    @property
    def silent_s(self) -> float:
        """How long nothing has come, though this process was looking."""
        return self._loop.awake_s - self.heard_s

    def take(self) -> list[Message]:
        """What has come since the last time."""
        messages, self._messages = self._messages, []
        return messages

    def put_back(self, messages: list[Message]) -> None:
        """Let these be the first that are taken next."""
        self._messages[:0] = messages

    def send(self, kind: str, **fields: Any) -> None:
        """Say something; a connection that is gone swallows it, and `open` tells."""
        if not self.open:
            return
        self._unsent += json.dumps({"kind": kind, **fields}).encode() + b"\n"
        if len(self._unsent) > _MOST_UNSENT:
            self.close()
        else:
            self._on_write()

    def close(self, why: str = "its connection is closed") -> None:
        """Close it; what has come before can still be taken."""
        if self.open:
            self.open, self.why = False, why
            self._loop.forget(self._socket.fileno())
            self._socket.close()

    def _on_read(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"its connection has broken: {error.strerror or error}")
            return
        if not data:
            self.close()
            return
        self.heard_s = self._loop.awake_s
        self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        try:
            for line in lines:
                message = json.loads(line)
                self._messages.append({**message, "kind": str(message["kind"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            self.close()  # some other program's words
        if len(rest) > _LONGEST_LINE:
            self.close()

    def _on_write(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(f"its connection has broken: {error.strerror or error}")
            return
        if self._full != bool(self._unsent):
            self._full = not self._full
            self._loop.watch_writes(self._socket.fileno(), self._on_write if self._full else None)


BEAT_S = 2.0
# Of a process whose host still answers, see channel.DEAD_S: a file server that fails over holds it up for minutes.
SILENT_S = 120.0
What = Literal["stage", "ranks"]


@dataclass(frozen=True, slots=True)
class StopOrder:
    """Ask the ranks of this node to save and stop."""

    number: signal.Signals


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """End the ranks of this node: one elsewhere has died, or the nodes have lost each other."""


@dataclass(frozen=True, slots=True)
class StackRequest:
    """This rank of this node is stuck: take its stack and kill it."""

    rank: int


Order = StopOrder | RoundEnd | StackRequest


@dataclass(frozen=True, slots=True)
class Round:
    """What every node is to run now."""

    what: What
    start: str
    port: int  # of the ranks' own rendezvous


class SupervisorGroup(Protocol):
    """What the loop around a node's own ranks needs of the others."""

    @property
    def busy(self) -> bool:
        """Whether another node has yet to end this round."""
        ...

    def take(self) -> list[Order]:
        """What to do to the own ranks."""
        ...

    def tick(self, pace: StepPace | None) -> None:
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
