"""Which address of a host do the others reach? Tried out, since names and interface lists do not tell.

Ranks started by mpirun, or by srun --mpi=pmix, need no other launcher: over MPI they agree where to meet.

MPI is asked who this rank is and used for a few broadcasts, then left (MPI_Finalize) before torch is
imported: training itself runs over gloo or NCCL, and a rank may end as any process does.
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

_TOKEN_BYTES = 16
_TRY_S = 2.0
# Below the ports that Linux gives to outgoing connections (32768 and up), so none of these takes it
# between this look and the moment when rank 0 listens there.
_PORTS = range(20_000, 30_000)
_PORTS_TRIED = 1000


class ReachabilityProbe:
    """A port of this host that says a token to whoever connects: proof that it is this host and no other."""

    def __init__(self, listener: socket.socket) -> None:
        self.port = int(listener.getsockname()[1])
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._listener = listener
        self._thread = threading.Thread(target=self._greet, name="door", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls) -> "ReachabilityProbe":
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


def interface_of(address: str) -> str | None:
    """The interface that has this address."""
    return next((name for name, own in interfaces().items() if address in own), None)


def candidates() -> list[str]:
    """Addresses at which others may reach this host, the likeliest first."""
    own = [address for addresses in interfaces().values() for address in addresses]
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    return sorted(own, key=lambda one: one != named) or [socket.gethostname()]


log = logging.getLogger(__name__)
_INSTALL = "pip install 'lmscale[mpi]', or mpi4py for the MPI that this site's mpirun belongs to"


def meet(env: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment so that all ranks of this MPI job find each other. Collective.

    Nothing where no MPI has started this process, or where MASTER_ADDR is given. Raises ConfigError where
    MPI does not know the ranks that its starter has announced, DistributedError where hosts cannot
    reach each other.
    """
    if not any(name in env for name in MPI_RANK_VARIABLES) or "MASTER_ADDR" in env:
        return {}
    if "OMPI_COMM_WORLD_RANK" in env:
        # Whoever kills mpirun with SIGKILL must not leave ranks behind: it cannot end them then.
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
    everybody = mpi.COMM_WORLD
    _check_size(everybody.Get_size(), env)
    host = everybody.Split_type(mpi.COMM_TYPE_SHARED, everybody.Get_rank())
    # Neighbours on a host get neighbouring numbers, however mpirun has dealt the ranks out.
    own = (host.bcast(everybody.Get_rank()), host.Get_rank())
    rank = sorted(everybody.allgather(own)).index(own)
    size, local_size = everybody.Get_size(), host.Get_size()
    added = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(host.Get_rank()),
        "LOCAL_WORLD_SIZE": str(local_size),
    }
    if "OMP_NUM_THREADS" not in env:
        added["OMP_NUM_THREADS"] = str(_threads(host.allgather))
    added |= _many_hosts(everybody, host) if size > local_size else _one_host(everybody)
    start = everybody.bcast(start_name(env))
    if "LMSCALE_START" not in env:
        added |= {"LMSCALE_START": start, "LMSCALE_BY_HAND": "1"}
    return added


def _check_size(size: int, env: Mapping[str, str]) -> None:
    """Another MPI than the starter's makes each rank a world of one: N runs instead of one of N ranks."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    told = next((env[name] for name in names if env.get(name, "").isdecimal()), str(size))
    if int(told) != size:
        fact = f"{told} ranks were started, but the MPI that mpi4py uses knows {size}"
        hint = f"mpirun and mpi4py belong to different MPIs: {_INSTALL}; with srun, try --mpi=pmix"
        raise ConfigError([Problem("", fact, hint)])


def _threads(allgather: Callable[[object], list[Any]]) -> int:
    """Threads of this rank: its own cores where it is bound to some, else its share of the host's."""
    sets = allgather(sorted(os.sched_getaffinity(0)))
    shared = all(cores == sets[0] for cores in sets)
    return max(1, len(sets[0]) // len(sets)) if shared else len(os.sched_getaffinity(0))


def _one_host(everybody: Any) -> dict[str, str]:
    port = None
    if everybody.Get_rank() == 0:
        with closing(ReachabilityProbe.open()) as door:
            port = door.port
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(everybody.bcast(port))}


def _many_hosts(everybody: Any, host: Any) -> dict[str, str]:
    """An address of rank 0's host at which every other host has just reached it. Collective."""
    address, port, near = _root(everybody) if everybody.Get_rank() == 0 else _guest(everybody, host)
    if address is None:
        raise DistributedError(
            "no address of rank 0's host is reached from every other host; rank 0 says which were tried. "
            "Let the hosts connect to each other, or set MASTER_ADDR and MASTER_PORT (mpirun -x)"
        )
    added = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    # Gloo would listen where the host's own name points to, which on Debian is 127.0.1.1.
    interface = host.bcast(near and interface_of(near))
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        added["GLOO_SOCKET_IFNAME"] = interface
    return added


def _root(everybody: Any) -> tuple[str | None, int, str | None]:
    """Offer addresses and choose; the address, the port, and this host's own address on the way."""
    offered = candidates()
    with closing(ReachabilityProbe.open()) as door:
        everybody.bcast((offered, door.port, door.token))
        answers = dict(one for one in everybody.gather(None) if one)
    common = [one for one in offered if all(there[one] for there in answers.values())]
    address = everybody.bcast(common[0] if common else None)
    for name, there in {} if common else answers.items():
        found = ", ".join(one for one in offered if there[one]) or "none"
        log.error("%s reaches of %s, port %d: %s", name, ", ".join(offered), door.port, found)
    return address, door.port, address


def _guest(everybody: Any, host: Any) -> tuple[str | None, int, str | None]:
    """Try the addresses, once a host; as `_root`."""
    offered, port, token = everybody.bcast(None)
    there = {}
    if host.Get_rank() == 0:
        there = {one: reached(one, port, token) for one in offered}
    everybody.gather((socket.gethostname(), there) if there else None)
    address = everybody.bcast(None)
    return address, port, there.get(address)


def _without_mpi(env: Mapping[str, str], error: Exception) -> dict[str, str]:
    """One host does without mpi4py: what mpirun has told its ranks is enough there."""
    if "RANK" in env and env.get("LOCAL_WORLD_SIZE", "-") == env.get("WORLD_SIZE"):
        # All ranks must agree without a word: a number from the job's name, below the ports that
        # Linux gives to outgoing connections (32768 and up).
        name = env.get("PMIX_NAMESPACE", "").encode()
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + zlib.crc32(name) % 10_000)}
    fact = f"MPI ranks find each other with mpi4py, which cannot be used here: {error}"
    hint = f"{_INSTALL}; or set MASTER_ADDR and MASTER_PORT; on one host `mpirun -n N lmscale train` needs none"
    raise ConfigError([Problem("", fact, hint)])
