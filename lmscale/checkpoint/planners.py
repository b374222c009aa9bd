"""Who writes and who reads what: torch.distributed.checkpoint's planners, with our refusals."""

import math
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan

from lmscale.base.errors import CheckpointError, ExitCode
from lmscale.checkpoint.tensor_format import DTYPES


class Mismatch(CheckpointError):
    """The checkpoint is sound but holds another model: falling back to an older one is no cure."""

    exit_code = ExitCode.CONFIG


class SavePlanner(DefaultSavePlanner):
    """Each box once: copies on several ranks are written by the rank with least to write so far."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """This rank's boxes. More ranks than rows leave ranks with empty shards: nothing to write."""
        for name, tensor in self.state_dict.items():
            assert isinstance(tensor, torch.Tensor), f"{name}: {type(tensor)} is no tensor"
            assert tensor.dtype in DTYPES, (
                f"{name}: {tensor.dtype} cannot be saved, hand over the fp32 master "
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
    """Every tensor asked for must be in the checkpoint, with its shape and a type that holds it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        """The boxes this rank needs, or Mismatch with all differences."""
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        problems = [p for name, t in self.state_dict.items() if (p := _misfit(saved, name, t))]
        if problems:
            shown = "\n  - ".join(problems[:20])
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise Mismatch(
                f"the checkpoint holds another model: {len(problems)} tensor(s) differ\n  - {shown}"
                f"{more}\n  hint: resume with the model and optimizer of the checkpoint's config.yaml"
            )
        return super().create_local_plan()


_FLOATS = (torch.float32, torch.float64)


def _misfit(saved: dict[str, Any], name: str, tensor: torch.Tensor) -> str:
    found = saved.get(name)
    if not isinstance(found, TensorStorageMetadata):
        return f"{name}: not in the checkpoint"
    if found.size != tensor.size():
        return f"{name}: {tuple(found.size)} in the checkpoint, {tuple(tensor.size())} here"
    have = found.properties.dtype
    if have != tensor.dtype and not (have in _FLOATS and tensor.dtype in _FLOATS):
        return f"{name}: {have} in the checkpoint, {tensor.dtype} here"
    return ""
