"""Ranks that mpirun or `srun --mpi=pmix` has started agree over MPI on where to meet.

MPI reports who this rank is and carries a few broadcasts, then it is finalized, before torch is
imported: training runs over gloo or NCCL, and a rank may end as any process does.

Rank 0 offers its addresses, and every other host tries them: host names and interface lists do not show
which address is reachable (Debian's own name is 127.0.1.1; a Docker bridge has the same address on
every host).
"""

import logging
import os
import random
import secrets
import socket
import threading
import zlib
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from typing import Any

from lmscale.base.env import MPI_RANK_VARIABLES
from lmscale.base.errors import ConfigError, DistributedError, Problem
from lmscale.base.proc import die_with_parent, interfaces
from lmscale.run_folder.events import start_name

log = logging.getLogger(__name__)

_TOKEN_BYTES = 16
_CONNECT_TIMEOUT_S = 2.0
# Below the ports that Linux gives to outgoing connections (32768 and up), so none of these takes the port
# between the probe and the moment when rank 0 listens there.
_PORTS = range(20_000, 30_000)
_PORT_ATTEMPTS = 1000
_INSTALL = "pip install 'lmscale[mpi]', or mpi4py for the MPI that this site's mpirun belongs to"


def meet(env: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to the environment so that all ranks of this MPI job find each other. Collective.

    Empty where no MPI has started this process, or where MASTER_ADDR is given. Raises ConfigError where
    MPI reports another number of ranks than were started, DistributedError where hosts cannot reach
    each other.
    """
    if not any(name in env for name in MPI_RANK_VARIABLES) or "MASTER_ADDR" in env:
        return {}
    if "OMPI_COMM_WORLD_RANK" in env:
        # An mpirun killed by SIGKILL cannot end its ranks.
        die_with_parent()
    try:
        mpi = _library()
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no libmpi
        return _without_mpi(env, error)
    mpi.Init()
    added = _agree(mpi, env)
    mpi.Finalize()  # not after an error: it waits for all ranks
    return added


def _library() -> Any:
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    return MPI


def _agree(mpi: Any, env: Mapping[str, str]) -> dict[str, str]:
    """Rank, sizes, address, port and the name of the start, the same for all where they must be."""
    world = mpi.COMM_WORLD
    _check_size(world.Get_size(), env)
    host = world.Split_type(mpi.COMM_TYPE_SHARED, world.Get_rank())
    # Ranks of one host get neighbouring numbers, however mpirun has placed them.
    own = (host.bcast(world.Get_rank()), host.Get_rank())
    rank = sorted(world.allgather(own)).index(own)
    size, local_size = world.Get_size(), host.Get_size()
    added = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(host.Get_rank()),
        "LOCAL_WORLD_SIZE": str(local_size),
    }
    if "OMP_NUM_THREADS" not in env:
        added["OMP_NUM_THREADS"] = str(_threads(host.allgather))
    added |= _many_hosts(world, host) if size > local_size else _one_host(world)
    start = world.bcast(start_name(env))
    if "LMSCALE_START" not in env:
        added |= {"LMSCALE_START": start, "LMSCALE_BY_HAND": "1"}
    return added


def _check_size(size: int, env: Mapping[str, str]) -> None:
    """mpi4py of another MPI than mpirun's gives N runs of one rank instead of one run of N ranks."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    started = next((env[name] for name in names if env.get(name, "").isdecimal()), str(size))
    if int(started) != size:
        fact = f"{started} ranks were started, but the MPI that mpi4py uses reports {size}"
        hint = f"mpirun and mpi4py belong to different MPIs: {_INSTALL}; with srun, try --mpi=pmix"
        raise ConfigError([Problem("", fact, hint)])


def _threads(allgather: Callable[[object], list[Any]]) -> int:
    """Threads of this rank: its own cores where it is bound to some, else an equal part of the host's."""
    sets = allgather(sorted(os.sched_getaffinity(0)))
    shared = all(cores == sets[0] for cores in sets)
    return max(1, len(sets[0]) // len(sets)) if shared else len(os.sched_getaffinity(0))


def _one_host(world: Any) -> dict[str, str]:
    port = None
    if world.Get_rank() == 0:
        with closing(ReachabilityProbe.open()) as probe:
            port = probe.port
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(world.bcast(port))}


def _many_hosts(world: Any, host: Any) -> dict[str, str]:
    """An address of rank 0's host at which every other host has just reached it. Collective."""
    address, port, route = (
        _offer_addresses(world) if world.Get_rank() == 0 else _try_addresses(world, host)
    )
    if address is None:
        raise DistributedError(
            "no address of rank 0's host is reachable from every other host; rank 0's log lists the addresses tried. "
            "Let the hosts connect to each other, or set MASTER_ADDR and MASTER_PORT (mpirun -x)"
        )
    added = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    # Gloo would listen at the address of the host's own name, which on Debian is 127.0.1.1.
    interface = host.bcast(route and interface_of(route))
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        added["GLOO_SOCKET_IFNAME"] = interface
    return added


def _offer_addresses(world: Any) -> tuple[str | None, int, str | None]:
    """Rank 0: (chosen address or None, port, this host's address on the route). Collective."""
    offered = candidates()
    with closing(ReachabilityProbe.open()) as probe:
        world.bcast((offered, probe.port, probe.token))
        answers = dict(answer for answer in world.gather(None) if answer)
    common = [a for a in offered if all(results[a] for results in answers.values())]
    address = world.bcast(common[0] if common else None)
    for name, results in {} if common else answers.items():
        reachable = ", ".join(a for a in offered if results[a]) or "none"
        log.error(
            "host %s can connect to these addresses of rank 0 (tried %s, port %d): %s",
            name, ", ".join(offered), probe.port, reachable,
        )  # fmt: skip
    return address, probe.port, address


def _try_addresses(world: Any, host: Any) -> tuple[str | None, int, str | None]:
    """The other ranks, once per host: the same three values as `_offer_addresses`. Collective."""
    offered, port, token = world.bcast(None)
    routes = {}
    if host.Get_rank() == 0:
        routes = {address: reached(address, port, token) for address in offered}
    world.gather((socket.gethostname(), routes) if routes else None)
    chosen = world.bcast(None)
    return chosen, port, routes.get(chosen)


def _without_mpi(env: Mapping[str, str], error: Exception) -> dict[str, str]:
    """On one host mpi4py is not needed: the variables that mpirun has set are enough."""
    if "RANK" in env and env.get("LOCAL_WORLD_SIZE", "-") == env.get("WORLD_SIZE"):
        # All ranks must choose the same port without communication: a number from the job's name.
        name = env.get("PMIX_NAMESPACE", "").encode()
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + zlib.crc32(name) % 10_000)}
    fact = f"MPI ranks find each other with mpi4py, which cannot be used here: {error}"
    hint = f"{_INSTALL}; or set MASTER_ADDR and MASTER_PORT; on one host `mpirun -n N lmscale train` needs none"
    raise ConfigError([Problem("", fact, hint)])


class ReachabilityProbe:
    """A listening port that sends a token to every client: proof that the client has reached this host."""

    def __init__(self, listener: socket.socket) -> None:
        self.port = int(listener.getsockname()[1])
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._listener = listener
        self._thread = threading.Thread(
            target=self._send_tokens, name="reachability-probe", daemon=True
        )
        self._thread.start()

    @classmethod
    def open(cls) -> "ReachabilityProbe":
        """Listen on a free port, on all interfaces. Raises OSError after many ports in use."""
        attempts = 0
        while True:
            listener = socket.socket()
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", random.choice(_PORTS)))
                listener.listen()
                return cls(listener)
            except OSError:
                listener.close()
                attempts += 1
                if attempts == _PORT_ATTEMPTS:
                    raise

    def _send_tokens(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            with client, suppress(OSError):
                client.settimeout(_CONNECT_TIMEOUT_S)
                client.sendall(self.token)
                client.recv(1)  # the side that closes first keeps its port in TIME_WAIT: the client

    def close(self) -> None:
        """Free the port. The thread has ended when this returns: what follows may fork."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


def reached(address: str, port: int, token: bytes) -> str | None:
    """This host's own address on the route; None when the probe is not reachable at this address."""
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT_S) as connection:
            if connection.recv(_TOKEN_BYTES, socket.MSG_WAITALL) == token:
                return str(connection.getsockname()[0])
    except OSError:
        pass
    return None


def interface_of(address: str) -> str | None:
    """The interface that has this address."""
    return next((name for name, own in interfaces().items() if address in own), None)


def candidates() -> list[str]:
    """Addresses at which other hosts may reach this host, the most likely first."""
    own = [address for addresses in interfaces().values() for address in addresses]
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    return sorted(own, key=lambda address: address != named) or [socket.gethostname()]
