"""torch.distributed.checkpoint (DCP) with our rules: its planners refuse what cannot be stored or
loaded, and a failure on any rank becomes one of our errors on all ranks.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan

from lmscale.base.errors import CheckpointError, ExitCode, LmscaleError
from lmscale.checkpoint.tensor_format import DTYPES
from lmscale.distributed.process_group import collective, decisive_error, portable

T = TypeVar("T")


class Mismatch(CheckpointError):
    """The checkpoint is sound but of another model, so falling back to an older one cannot help."""

    exit_code = ExitCode.CONFIG


class SavePlanner(DefaultSavePlanner):
    """Plans each box once: of several copies, the rank with the fewest bytes so far writes its own."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """This rank's boxes. Empty shards (more ranks than rows) are left out."""
        for name, tensor in self.state_dict.items():
            assert isinstance(tensor, torch.Tensor), f"{name}: {type(tensor)} is not a tensor"
            assert tensor.dtype in DTYPES, (
                f"{name}: {tensor.dtype} cannot be saved; pass the fp32 master weights "
                f"(known: {', '.join(map(str, DTYPES))})"
            )
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            if math.prod(data.chunk.sizes) or not math.prod(data.size):
                items.append(item)
        self.plan = SavePlan(items, planner_data=plan.planner_data)
        return self.plan


class LoadPlanner(DefaultLoadPlanner):
    """Requires that the checkpoint contains every requested tensor, with its shape and a fitting type."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        """The boxes that this rank needs. Raises Mismatch, which names the first 20 differences."""
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        problems = [p for name, t in self.state_dict.items() if (p := _misfit(saved, name, t))]
        if problems:
            shown = "\n  - ".join(problems[:20])
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise Mismatch(
                f"the checkpoint is of another model: {len(problems)} tensor(s) differ\n  - {shown}"
                f"{more}\n  hint: resume with the model and optimizer of the checkpoint's config.yaml"
            )
        return super().create_local_plan()


_FLOATS = (torch.float32, torch.float64)


def _misfit(saved: dict[str, Any], name: str, tensor: torch.Tensor) -> str:
    stored = saved.get(name)
    if not isinstance(stored, TensorStorageMetadata):
        return f"{name}: not in the checkpoint"
    if stored.size != tensor.size():
        return f"{name}: {tuple(stored.size)} in the checkpoint, {tuple(tensor.size())} here"
    dtype = stored.properties.dtype
    if dtype != tensor.dtype and not (dtype in _FLOATS and tensor.dtype in _FLOATS):
        return f"{name}: {dtype} in the checkpoint, {tensor.dtype} here"
    return ""


@contextmanager
def agreed_outcome(what: str) -> Iterator[None]:
    """Inside, DCP's collectives raise the one decisive error of all ranks, as an LmscaleError.

    DCP collects the exception of every rank before it raises, so no rank is left waiting.
    """
    try:
        with collective(what), warnings.catch_warnings():
            # DCP warns at each call without a process group; a load in one process has none on purpose.
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
