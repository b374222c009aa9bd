"""Who this process is among its peers, read once from the environment into a value."""

from collections.abc import Mapping
from dataclasses import dataclass

from lmscale.base.errors import UsageError
from lmscale.base.listener import inherited


@dataclass(frozen=True, slots=True)
class World:
    """Ranks as torchrun, accelerate and our supervisor name them."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    master: str | None = None  # host:port of the rendezvous; None for a world of one
    start: str = ""  # LMSCALE_START: names this start of the job, the same on all nodes
    rendezvous_fd: int | None = None  # of rank 0, where it inherits the socket behind `master`

    @property
    def node(self) -> int:
        """Which host, counted in ranks: hosts hold equally many."""
        return self.rank // self.local_size

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "World":
        """Read RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LMSCALE_START
        and LMSCALE_RENDEZVOUS_FD.

        Without RANK the world is this one process. Raises UsageError for values that contradict each other.
        """
        start = env.get("LMSCALE_START", "")
        if "RANK" not in env:
            return cls(start=start)
        rank = _count(env, "RANK")
        size = _count(env, "WORLD_SIZE")
        local_rank = _count(env, "LOCAL_RANK", rank)
        local_size = _count(env, "LOCAL_WORLD_SIZE", size)
        if not (rank < size and local_rank < local_size <= size):
            raise UsageError(
                f"environment: RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of "
                f"LOCAL_WORLD_SIZE={local_size} contradict each other; let a launcher set them, "
                "or unset RANK to run one process"
            )
        if size == 1:
            return cls(start=start)
        address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
        if not address or not port:
            raise UsageError(
                "environment: WORLD_SIZE > 1 needs MASTER_ADDR and MASTER_PORT; "
                "start with `lmscale train`, torchrun or accelerate launch, which set them"
            )
        listening = inherited(env, port) if rank == 0 else None
        return cls(rank, local_rank, size, local_size, f"{address}:{port}", start, listening)


def _count(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise UsageError(
            f"environment: {name}={text!r} is not a rank or a count; let a launcher set it"
        )
    return int(text)
