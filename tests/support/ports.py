"""A port for a test that must know its number before anybody listens there."""

import random
import socket

# Below the ports that Linux gives to outgoing connections (32768 and up): gloo alone makes hundreds.
_PORTS = range(20_000, 30_000)


def free_port() -> int:
    """One that nobody listens on, on any address of this host."""
    while True:
        with socket.socket() as probe:
            port = random.choice(_PORTS)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
