"""The process group of a run: ranks join it, agree over it, and notice when one of them is lost.

`distributed` joins and leaves. `agree`, `sum_over`, `on_root` and the object functions are what ranks
exchange outside an engine; all are collective over their group. They carry CPU data over gloo and never
wait for a device (`sum_over` works on its tensor's device). Every call ends within the group's deadline,
and the loss of a peer is a DistributedError, distinct from a bug, although torch raises RuntimeError for
both. `choose_device` and `to_device` place this rank and its batches.
"""

import hashlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from lmscale.base.batch import Batch
from lmscale.base.errors import ConfigError, DistributedError, LmscaleError, Problem, decisive
from lmscale.base.fs import storage_error
from lmscale.base.world import World

DEADLINE_S = 600.0  # longer than the slowest save of one rank: its peers wait inside a collective
# Messages of gloo (torch 2.13), the TCP store and NCCL's watchdog when a peer is gone or silent. A
# mismatched collective ("enforce fail", "op.preamble") is a bug in lmscale and stays a RuntimeError.
_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|timed? ?out|not connected"
    r"|connectFullMesh failed|failed to connect|socket error|remote process exited|recvValue failed"
    r"|connection was likely closed|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)
_LOST_TYPES = (dist.DistNetworkError, dist.DistStoreError)

T = TypeVar("T")


def lost_peer(error: BaseException) -> bool:
    """Whether this exception means that a peer is gone or did not answer in time."""
    if isinstance(error, (*_LOST_TYPES, ConnectionError, TimeoutError)):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Turn the loss of a peer inside the block into a DistributedError that names `what`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DistributedError) or not lost_peer(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DistributedError(
            f"{what}: a peer is gone or did not answer in time ({reason}). The cause is in that "
            "peer's log; the same command resumes from the newest checkpoint"
        ) from error


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum over all ranks of the group (None = all), on the tensor's device; a new tensor."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    with collective(f"sum of {tuple(tensor.shape)}"):
        dist.all_reduce(total, group=group)
    return total


def agree(flags: Mapping[str, int], group: dist.ProcessGroup | None = None) -> dict[str, int]:
    """The maximum of every flag over all ranks; the training loop calls it once per step.

    All ranks must pass the same flags. That is checked in the same all-reduce, because a different
    set of flags on one rank would otherwise be read under the names of another.
    """
    names = sorted(flags)
    sign = int.from_bytes(hashlib.blake2b("\0".join(names).encode(), digest_size=7).digest())
    values = torch.tensor([*(flags[name] for name in names), sign, -sign], dtype=torch.int64)
    with collective("agreement of a step"):
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    *agreed, high, low = values.tolist()
    assert high == -low, f"ranks pass different flags; this rank: {names}"
    return dict(zip(names, agreed, strict=True))


def broadcast_object(value: T, src: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """Rank `src`'s value (global rank), on all ranks. It is pickled between our own processes."""
    box = [value]
    with collective(f"object from rank {src}"):
        dist.broadcast_object_list(box, src=src, group=group)
    return box[0]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order, on all ranks."""
    values: list[T | None] = [None] * dist.get_world_size(group)
    with collective("objects of all ranks"):
        dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]  # each None was replaced


def on_root(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `work` on rank 0 alone; its result, or its exception, on all ranks.

    Collective. Without a process group this process is the only rank.
    """
    alone = not dist.is_initialized()
    outcome: tuple[T | None, LmscaleError | None] = (None, None)
    if alone or dist.get_rank(group) == 0:
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = (None, portable(error))
    if not alone:
        src = 0 if group is None else dist.get_global_rank(group, 0)
        outcome = broadcast_object(outcome, src, group)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # T may be None


def portable(error: BaseException) -> LmscaleError:
    """The error as an LmscaleError, which pickles and means the same on every rank."""
    if isinstance(error, LmscaleError):
        return error
    if isinstance(error, OSError):
        return storage_error(f"reading or writing {error.filename or 'a file'}", error)
    return LmscaleError("this is a bug in lmscale:\n" + "".join(traceback.format_exception(error)))


def decisive_error(failures: list[LmscaleError]) -> LmscaleError:
    """The error that all ranks raise for several; the order of exit codes is that of errors.decisive."""
    code = decisive(int(failure.exit_code) for failure in failures)
    return next(failure for failure in failures if int(failure.exit_code) == code)


@contextmanager
def distributed(
    world: World, *, device: torch.device, timeout_s: float = DEADLINE_S
) -> Iterator[None]:
    """Join the process group and leave it again; a peer's loss in the block is a DistributedError.

    Collective. Every collective on the default group, and joining itself, ends after `timeout_s`.
    CPU tensors travel over gloo and CUDA tensors over NCCL, so the control plane (`agree`, objects)
    needs no device sync. A world of one gets a group too, without a socket.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with collective(f"rank {world.rank} of {world.size}: joining at {world.master}"):
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
        # torch's tcp:// rendezvous handles a store that torchrun's agent already hosts on that port.
        url = f"tcp://{world.master}?rank={world.rank}&world_size={world.size}"
        store, _, _ = next(dist.rendezvous(url, timeout=timeout))
    # One prefix per start: otherwise a restarted rank may connect to the address of a dead peer.
    return dist.PrefixStore(world.start or "lmscale", store)


def _listening(world: World, descriptor: int, timeout: timedelta) -> dist.Store:
    """Rank 0's store on a socket that listens already; it takes ownership of the descriptor."""
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

    The number of CPU threads follows from OMP_NUM_THREADS when torch was imported.
    Raises ConfigError where the host has too few CUDA devices.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    devices = torch.cuda.device_count()
    if world.local_rank >= devices:
        raise ConfigError(
            [
                Problem(
                    "cluster.ranks_per_node",
                    f"local rank {world.local_rank} finds {devices} CUDA device(s) on its host",
                    f"start at most {devices} rank(s) per host, or let every rank see all GPUs of its "
                    'host (no --gpus-per-task binding); CUDA_VISIBLE_DEVICES="" trains on the CPU',
                )
            ]
        )
    return torch.device("cuda", world.local_rank)


def to_device(batch: Batch[np.ndarray], device: torch.device) -> Batch[torch.Tensor]:
    """The same batch as tensors. On CUDA the copy is asynchronous, from pinned memory.

    On the CPU the tensors share memory with writable arrays: the loader must not reuse them.
    """

    def convert(array: np.ndarray) -> torch.Tensor:
        # from_numpy warns about read-only arrays (views of a corpus): writing there would be fatal
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return batch.map(convert)
