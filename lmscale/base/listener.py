"""The listening socket of the ranks' rendezvous, opened by the process that starts them and inherited by rank 0.

A port number alone is not enough: rank 0 needs seconds to import torch, and meanwhile Linux can give a free port to an
outgoing connection.
"""

import errno
import os
import socket
from collections.abc import Mapping

RENDEZVOUS_FD = "LMSCALE_RENDEZVOUS_FD"  # for rank 0: the descriptor that listens on MASTER_PORT
_BACKLOG = 4096  # ranks may all come before rank 0 answers; the kernel takes the lesser of this and somaxconn


def listen(port: int = 0) -> socket.socket:
    """On all interfaces, by IPv6 and IPv4 where the host has both. Raises OSError where the port is taken."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        except OSError as error:
            # IPv4 alone may still be free, but whoever dials tries IPv6 first.
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=_BACKLOG)


def inherited(env: Mapping[str, str], port: str) -> int | None:
    """The descriptor that listens on this port for us. In a child of rank 0 the number may be another file's."""
    text = env.get(RENDEZVOUS_FD, "")
    if not text.isdecimal():
        return None
    try:
        with socket.socket(fileno=os.dup(int(text))) as one:
            listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            mine = bool(listens) and str(one.getsockname()[1]) == port
    except OSError:
        return None
    return int(text) if mine else None
