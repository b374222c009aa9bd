"""Where MPI ranks meet: which address is reached, and what is said where MPI does not know the ranks."""

import builtins
import os
import socket
from contextlib import closing
from typing import Any

import pytest

from lmscale.base.errors import ConfigError
from lmscale.base.proc import interfaces
from lmscale.distributed import mpi_rendezvous
from lmscale.distributed.mpi_rendezvous import (
    ReachabilityProbe,
    candidates,
    interface_of,
    meet,
    reached,
)


def test_a_probe_sends_its_token_and_frees_its_port() -> None:
    with closing(ReachabilityProbe.open()) as probe:
        assert reached("127.0.0.1", probe.port, probe.token) == "127.0.0.1"
        assert reached("127.0.0.1", probe.port, bytes(16)) is None  # another host's probe
        assert probe.port in range(20_000, 30_000)
    assert reached("127.0.0.1", probe.port, probe.token) is None
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("", probe.port))


def test_a_port_in_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(ReachabilityProbe.open()) as first:
        choices = iter([first.port, first.port, 29_999, 29_998, 29_997])
        monkeypatch.setattr(mpi_rendezvous.random, "choice", lambda _: next(choices))
        with closing(ReachabilityProbe.open()) as second:
            assert second.port != first.port


def test_an_address_without_an_answer_is_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_rendezvous, "_CONNECT_TIMEOUT_S", 0.2)
    assert reached("192.0.2.1", 20_000, bytes(16)) is None  # TEST-NET, routed nowhere
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert reached("127.0.0.1", silent.getsockname()[1], bytes(16)) is None


def test_addresses_of_this_host_are_reached_and_belong_to_interfaces() -> None:
    with closing(ReachabilityProbe.open()) as probe:
        for name, addresses in interfaces().items():
            for address in addresses:
                own = reached(address, probe.port, probe.token)
                assert own is not None and interface_of(own) == name
    assert candidates()


def test_no_variables_are_added_without_mpi_or_with_a_given_address() -> None:
    assert meet({}) == {}
    assert meet({"RANK": "0", "WORLD_SIZE": "2"}) == {}
    assert meet({"PMIX_RANK": "0", "MASTER_ADDR": "h"}) == {}


@pytest.fixture
def no_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("mpi4py"):
            raise ImportError("No module named 'mpi4py'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.mark.usefixtures("no_mpi4py")
def test_without_mpi4py_one_host_works_and_several_say_what_to_install() -> None:
    env = {"PMIX_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    added = meet({**env, "PMIX_NAMESPACE": "a@1"})
    assert added["MASTER_ADDR"] == "127.0.0.1"
    assert added == meet({**env, "RANK": "0", "PMIX_NAMESPACE": "a@1"})
    assert added != meet({**env, "PMIX_NAMESPACE": "b@1"})
    for lacking in ({**env, "WORLD_SIZE": "4"}, {"PMIX_RANK": "1"}):
        with pytest.raises(ConfigError, match=r"(?s)mpi4py.*pip install 'lmscale\[mpi\]'"):
            meet(lacking)


@pytest.mark.parametrize(
    "env",
    [
        {"OMPI_COMM_WORLD_SIZE": "8", "SLURM_NTASKS": "1"},  # mpirun inside of a Slurm job
        {"PMI_SIZE": "8"},
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "4"},
    ],
)
def test_a_world_of_one_in_place_of_eight_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"8 ranks were started, but .* reports 1"):
        mpi_rendezvous._check_size(1, env)
    mpi_rendezvous._check_size(8, env)
    mpi_rendezvous._check_size(1, {})


def test_threads_are_the_own_cores_of_a_bound_rank_else_a_share() -> None:
    own = sorted(os.sched_getaffinity(0))
    assert mpi_rendezvous._threads(lambda mine: [list(range(8))] * 4) == 2
    assert mpi_rendezvous._threads(lambda mine: [mine] * (len(own) + 1)) == 1
    assert mpi_rendezvous._threads(lambda mine: [mine, [99]]) == len(own)
