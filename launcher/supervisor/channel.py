"""A connection between two supervisors: JSON objects, a line each. Nothing here ever waits."""

import contextlib
import json
import socket
from typing import Any

from launcher.supervisor.loop import Loop

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

    def __init__(self, connection: socket.socket, loop: Loop) -> None:
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
