"""The process group of a run, and the device of this rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from lmscale.dist.peers import collective
from lmscale.errors import ConfigError, Problem
from lmscale.world import World

DEADLINE_S = 600.0  # longer than the slowest save of one rank: its peers wait inside a collective


@contextmanager
def distributed(
    world: World, *, device: torch.device, timeout_s: float = DEADLINE_S
) -> Iterator[None]:
    """Meet the other ranks and leave them again; a peer's loss in the block is a DistributedError.

    Collective. Every collective on the default group, and meeting itself, ends after `timeout_s`.
    CPU tensors travel over gloo and CUDA tensors over NCCL, so the control plane (`agree`, objects)
    needs no device sync. A world of one gets a group too, without a socket.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with collective(f"rank {world.rank} of {world.size}: meeting at {world.master}"):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_store(world, timeout),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
    try:
        with collective(f"rank {world.rank} of {world.size}"):
            yield
    except BaseException:
        # With NCCL, leaving waits for kernels whose peers may be gone; the process ends anyway.
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _store(world: World, timeout: timedelta) -> dist.Store:
    if world.size == 1:
        return dist.HashStore()
    if world.rendezvous_fd is not None:
        store = _listening(world, world.rendezvous_fd, timeout)
    else:
        # torch's tcp:// rendezvous knows when torchrun's agent already hosts the store on that port.
        url = f"tcp://{world.master}?rank={world.rank}&world_size={world.size}"
        store, _, _ = next(dist.rendezvous(url, timeout=timeout))
    # A start of its own prefix: otherwise a restarted rank may dial an address of a dead peer.
    return dist.PrefixStore(world.start or "lmscale", store)


def _listening(world: World, descriptor: int, timeout: timedelta) -> dist.Store:
    """Rank 0's, as torch's rendezvous makes it, on a socket that listens already. It owns the descriptor then."""
    address, _, port = str(world.master).rpartition(":")
    return dist.TCPStore(
        address,
        int(port),
        world.size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=descriptor,
    )


def choose_device(world: World) -> torch.device:
    """cuda:LOCAL_RANK where there is CUDA, else the CPU.

    CPU threads are what OMP_NUM_THREADS said when torch was imported.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    if world.local_rank >= seen:
        raise ConfigError(
            [
                Problem(
                    "cluster.ranks_per_node",
                    f"local rank {world.local_rank} finds {seen} CUDA device(s) on its host",
                    f"start at most {seen} rank(s) a host, or let every rank see all GPUs of its "
                    'host (no --gpus-per-task binding); CUDA_VISIBLE_DEVICES="" trains on the CPU',
                )
            ]
        )
    return torch.device("cuda", world.local_rank)
