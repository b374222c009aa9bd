"""Split a model's parameters over the data-parallel ranks with FSDP2."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lmscale.dist.mesh import Mesh
from lmscale.parallel.passes import blocks


@dataclass(frozen=True, slots=True)
class ShardPolicy:
    """How a sharded model computes."""

    compute: torch.dtype | None = None  # of gathered weights; None: as they are stored
    reshard_after_forward: bool = True  # free a block's weights between its forward and backward


def shard(model: nn.Module, mesh: Mesh, policy: ShardPolicy) -> FSDPModule:
    """Shard each block, then what is left (embedding, last norm, head) as one group. In place.

    Tied weights must share a group, and embedding and head are both in the last one. It stays gathered
    from forward to backward: the backward begins with it.

    A block's inputs are not cast: activations are in the compute type already, and what else travels
    with them (rotary angles) must keep its own precision.
    """
    mixed = MixedPrecisionPolicy(cast_forward_inputs=False)
    if policy.compute is not None:
        mixed = MixedPrecisionPolicy(
            param_dtype=policy.compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    axis = mesh.device_mesh["shard"]
    for block in blocks(model):
        fully_shard(
            block,
            mesh=axis,
            mp_policy=mixed,
            reshard_after_forward=policy.reshard_after_forward,
        )
    return fully_shard(model, mesh=axis, mp_policy=mixed, reshard_after_forward=False)
