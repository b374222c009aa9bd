"""The socket at which ranks meet, and who may think that it is theirs."""

import os
import socket

import pytest

from lmscale.base.listener import RENDEZVOUS_FD, inherited, listen
from lmscale.base.world import World


def test_one_listens_for_both_families_and_nobody_else_may() -> None:
    with listen() as one:
        port = one.getsockname()[1]
        for address in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
            socket.create_connection((address, port), timeout=5).close()
        with pytest.raises(OSError, match="in use"):
            listen(port)


def test_only_a_descriptor_that_listens_on_this_port_is_ours() -> None:
    with listen() as one, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port, number = str(one.getsockname()[1]), str(one.fileno())
        assert inherited({RENDEZVOUS_FD: number}, port) == one.fileno()
        assert inherited({}, port) is None
        assert inherited({RENDEZVOUS_FD: number}, "1") is None
        bound = {RENDEZVOUS_FD: str(other.fileno())}
        assert inherited(bound, str(other.getsockname()[1])) is None, "it does not listen"
        assert inherited({RENDEZVOUS_FD: "x"}, port) is None
    with open(os.devnull) as file:
        assert inherited({RENDEZVOUS_FD: str(file.fileno())}, port) is None
    assert inherited({RENDEZVOUS_FD: number}, port) is None, "closed"


def test_rank_0_alone_takes_it() -> None:
    with listen() as one:
        env = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(one.getsockname()[1]),
            RENDEZVOUS_FD: str(one.fileno()),
        }
        assert World.from_env({**env, "RANK": "0"}).rendezvous_fd == one.fileno()
        assert World.from_env({**env, "RANK": "1"}).rendezvous_fd is None
