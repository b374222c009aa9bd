"""The few things ranks say to each other outside an engine. All are collective over the group.

The control plane (`agree`, objects) is CPU data over gloo and never waits for a device. Each call
ends within the group's deadline; a peer's loss is a DistributedError.
"""

import hashlib
import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from lmscale.dist.peers import collective
from lmscale.errors import LmscaleError, decisive
from lmscale.run.durable import storage_error

T = TypeVar("T")


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum over all ranks of the group (None = all), on the tensor's device; a new tensor."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    with collective(f"sum of {tuple(tensor.shape)}"):
        dist.all_reduce(total, group=group)
    return total


def agree(flags: Mapping[str, int], group: dist.ProcessGroup | None = None) -> dict[str, int]:
    """The maximum of every flag over all ranks: what the loop asks once a step.

    All ranks must ask about the same flags; that is checked in the same all-reduce, because a
    different set of flags on one rank would otherwise be read under another's names.
    """
    names = sorted(flags)
    sign = int.from_bytes(hashlib.blake2b("\0".join(names).encode(), digest_size=7).digest())
    values = torch.tensor([*(flags[name] for name in names), sign, -sign], dtype=torch.int64)
    with collective("agreement of a step"):
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    *agreed, high, low = values.tolist()
    assert high == -low, f"ranks ask about different flags; this rank: {names}"
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
    """Run `work` on rank 0 alone; its result, or its exception, on all ranks."""
    outcome: tuple[T | None, LmscaleError | None] = (None, None)
    if dist.get_rank(group) == 0:
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = (None, portable(error))
    src = 0 if group is None else dist.get_global_rank(group, 0)
    result, failure = broadcast_object(outcome, src, group)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # T may be None


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `work` on every rank; if any rank fails, all raise the one error that decides.

    For work without collectives inside: a rank that fails in it must not leave the others waiting.
    """
    result: T | None = None
    failure: LmscaleError | None = None
    try:
        result = work()
    except Exception as error:
        failure = portable(error)
    failures = [found for found in gather_objects(failure, group) if found is not None]
    if failures:
        raise decisive_error(failures)
    return result  # type: ignore[return-value]  # T may be None


def portable(error: BaseException) -> LmscaleError:
    """The error as one of ours: it pickles, and means the same to every rank."""
    if isinstance(error, LmscaleError):
        return error
    if isinstance(error, OSError):
        return storage_error(f"reading or writing {error.filename or 'a file'}", error)
    return LmscaleError("this is a bug in lmscale:\n" + "".join(traceback.format_exception(error)))


def decisive_error(failures: list[LmscaleError]) -> LmscaleError:
    """The error that speaks for several ranks; the order of exit codes is errors.decisive's."""
    code = decisive(int(failure.exit_code) for failure in failures)
    return next(failure for failure in failures if int(failure.exit_code) == code)
