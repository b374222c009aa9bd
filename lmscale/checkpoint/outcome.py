"""One outcome for all ranks, in our errors, with or without a process group."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lmscale.base.errors import LmscaleError
from lmscale.distributed.process_group import collective, decisive_error, on_root, portable

T = TypeVar("T")


def as_root(work: Callable[[], T]) -> T:
    """`work` on rank 0 with its outcome on all ranks; without a process group, just `work`."""
    if dist.is_initialized():
        return on_root(work)
    try:
        return work()
    except Exception as error:
        raise portable(error) from error


@contextmanager
def one_outcome(what: str) -> Iterator[None]:
    """Around dcp.save and dcp.load: what failed on any rank, as the one error that decides.

    torch collects every rank's exception before it raises, so no rank is left waiting.
    """
    try:
        with collective(what), warnings.catch_warnings():
            # dcp says so once per call where there is no process group, which is what is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        raise decisive_error(
            [_of_rank(rank, error, str(stack)) for rank, (error, stack) in failure.failures.items()]
        ) from failure


def _of_rank(rank: int, error: BaseException, stack: str) -> LmscaleError:
    if isinstance(error, LmscaleError | OSError):
        return portable(error)
    return LmscaleError(f"rank {rank}: {type(error).__name__}: {error}\n{stack}")
