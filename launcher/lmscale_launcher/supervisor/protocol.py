"""The protocol between the supervisors of one start: messages, orders, and the connection that carries them.

Stop requests, deaths, stacks and exit codes go to node 0, which alone decides and alone writes events. It
answers with orders to the other nodes: end the ranks, stop them, or take the stack of one rank. A message is
a JSON object on a line of its own. No function here blocks.
"""

import contextlib
import json
import signal
import socket
from dataclasses import dataclass
from typing import Any, Protocol

from lmscale.base.decoding import RecordError
from lmscale.base.errors import FINAL, ExitCode
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.messages import (
    MAX_MESSAGE_BYTES,
    Message,
    RoundKind,
    decode_message,
)
from lmscale_launcher.supervisor.stall import StepPace

_READ_BYTES = 1 << 18
# A peer that does not read, so that more than this waits for it, is disconnected.
_MAX_UNSENT_BYTES = 1 << 26
BEAT_S = 2.0  # each side sends a message at least this often
# The kernel of the other host acknowledges data even while the process there waits for a hung file server. If it
# does not for this long, the host or the network has failed.
DEAD_S = 15
# The limit for a process whose host still acknowledges: a file server that fails over blocks it for minutes.
SILENT_S = 120.0
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_S // 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_S // 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_S),
)


@dataclass(frozen=True, slots=True)
class StopOrder:
    """Send the signal to the ranks of this node, which save and stop."""

    number: signal.Signals


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """End the ranks of this node: a rank of another node has died, or a node is lost."""


@dataclass(frozen=True, slots=True)
class StackRequest:
    """Take the stack of this stuck rank of this node, then kill it."""

    rank: int


Order = StopOrder | RoundEnd | StackRequest


@dataclass(frozen=True, slots=True)
class Round:
    """What every node runs now."""

    kind: RoundKind
    start: str
    port: int  # of the rendezvous of the ranks, on node 0


class SupervisorGroup(Protocol):
    """The supervisors of all nodes, as the watchdog of one node sees them.

    A single node has a group of its own.
    """

    @property
    def busy(self) -> bool:
        """Whether this node must wait for another one to end the round."""
        ...

    def take(self) -> list[Order]:
        """Orders for the ranks of this node since the last call."""
        ...

    def tick(self, pace: StepPace | None) -> None:
        """Send and check heartbeats. `pace` is that of this node's ranks, None without any."""
        ...

    def died(self, rank: int, code: int, *, others: bool) -> None:
        """Report that a rank of this node has ended by itself; `others` of this node still run."""
        ...

    def stop(self, number: signal.Signals) -> None:
        """Report a request to save and stop that has arrived at this node."""
        ...

    def stack(self, rank: int, text: str) -> None:
        """Report the stack of a stuck rank of this node."""
        ...


class Channel:
    """One side of the connection between two supervisors. Messages collect until they are taken."""

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
        self._blocked = (
            False  # the send buffer is full: the loop calls _on_write when there is room
        )
        self.open = True
        self.close_reason = ""
        self._received_s = loop.awake_s  # when data last arrived, by the clock of the loop
        loop.watch(connection.fileno(), self._on_read)

    @property
    def silent_s(self) -> float:
        """How long nothing has arrived while this process was running."""
        return self._loop.awake_s - self._received_s

    def take(self) -> list[Message]:
        """Messages that have arrived since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def put_back(self, messages: list[Message]) -> None:
        """Return messages to the front of the queue."""
        self._messages[:0] = messages

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message. On a closed connection this does nothing; see `open`."""
        if not self.open:
            return
        self._unsent += json.dumps({"kind": kind, **fields}).encode() + b"\n"
        if len(self._unsent) > _MAX_UNSENT_BYTES:
            self.close()
        else:
            self._on_write()

    def close(self, reason: str = "its connection is closed") -> None:
        """Close the connection; messages that have arrived can still be taken."""
        if self.open:
            self.open, self.close_reason = False, reason
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
        self._received_s = self._loop.awake_s
        self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        try:
            for line in lines:
                self._messages.append(decode_message(bytes(line)))
        except RecordError:
            self.close()  # not a message of a supervisor
        if len(rest) > MAX_MESSAGE_BYTES:
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
        if self._blocked != bool(self._unsent):
            self._blocked = not self._blocked
            on_write = self._on_write if self._blocked else None
            self._loop.watch_writes(self._socket.fileno(), on_write)


def loss_reason(channel: Channel) -> str:
    """Why the other side is lost; empty while it is connected."""
    if not channel.open:
        return channel.close_reason
    if channel.silent_s > SILENT_S:
        return f"no message has arrived for {channel.silent_s:.0f} s"
    return ""


def code_after_lost_node(code: int) -> int:
    """The exit code of a start that has lost a node: retry, unless a rank ended with a permanent failure."""
    return code if code in FINAL else ExitCode.RETRY
