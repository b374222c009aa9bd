"""Which address of a host do the others reach? Tried out, since names and interface lists do not tell."""

import fcntl
import random
import secrets
import socket
import struct
import threading
from contextlib import suppress

_TOKEN_BYTES = 16
_TRY_S = 2.0
_SIOCGIFADDR = 0x8915
# Below the ports that Linux gives to outgoing connections (32768 and up), so none of these takes it
# between this look and the moment when rank 0 listens there.
_PORTS = range(20_000, 30_000)
_PORTS_TRIED = 1000


class Door:
    """A port of this host that says a token to whoever connects: proof that it is this host and no other."""

    def __init__(self, listener: socket.socket) -> None:
        self.port = int(listener.getsockname()[1])
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._listener = listener
        self._thread = threading.Thread(target=self._greet, name="door", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls) -> "Door":
        """At a free port, on all interfaces."""
        tried = 0
        while True:
            listener = socket.socket()
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", random.choice(_PORTS)))
                listener.listen()
                return cls(listener)
            except OSError:
                listener.close()
                tried += 1
                if tried == _PORTS_TRIED:  # no port is to be had: say so and do not spin
                    raise

    def _greet(self) -> None:
        while True:
            try:
                guest, _ = self._listener.accept()
            except OSError:  # closed
                return
            with guest, suppress(OSError):
                guest.settimeout(_TRY_S)
                guest.sendall(self.token)
                guest.recv(1)  # who closes first keeps the port in TIME_WAIT: let it be the guest

    def close(self) -> None:
        """Free the port. The thread has ended when this returns: what follows may fork."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


def reached(address: str, port: int, token: bytes) -> str | None:
    """This host's own address on the way there; None when the door is not reached at this address."""
    try:
        with socket.create_connection((address, port), timeout=_TRY_S) as there:
            if there.recv(_TOKEN_BYTES, socket.MSG_WAITALL) == token:
                return str(there.getsockname()[0])
    except OSError:
        pass
    return None


def interfaces() -> dict[str, str]:
    """IPv4 address -> interface, for all that are up; loopback is left out."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                address = socket.inet_ntoa(answer[20:24])
                if not address.startswith("127."):
                    found[address] = name
    return found


def interface_of(address: str) -> str | None:
    """The interface that has this address."""
    return interfaces().get(address)


def candidates() -> list[str]:
    """Addresses at which others may reach this host, the likeliest first."""
    own = list(interfaces())
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    return sorted(own, key=lambda one: one != named) or [socket.gethostname()]
