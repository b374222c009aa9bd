"""Split a model's parameters over the data-parallel ranks with FSDP2."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from lmscale.distributed.mesh import Mesh
from lmscale.model.transformer import blocks_of


@dataclass(frozen=True, slots=True)
class ShardPolicy:
    """How a model is sharded and in which type it computes."""

    compute: torch.dtype | None = None  # of gathered weights; None: as they are stored
    reshard_after_forward: bool = True  # free a block's weights between its forward and backward
    offload: bool = False  # whether shards and their gradients are in the host's memory


def shard(model: nn.Module, mesh: Mesh, policy: ShardPolicy) -> FSDPModule:
    """Shard each block, then the rest (embedding, last norm, head) as one group. In place.

    Over the shard axis; with replicas (HSDP) each of them is sharded alike. Tied weights must be in one
    group, and embedding and head are both in the last one. It stays gathered from forward to backward:
    the backward begins with it.

    A block's inputs are not cast: activations are in the compute type already, and the other inputs
    (rotary angles) must keep their precision.
    """
    mixed = MixedPrecisionPolicy(cast_forward_inputs=False)
    if policy.compute is not None:
        mixed = MixedPrecisionPolicy(
            param_dtype=policy.compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    on_cuda = next(model.parameters()).device.type == "cuda"
    # Pinned memory needs an accelerator; without one nothing is copied anyway.
    offload = CPUOffloadPolicy(pin_memory=on_cuda) if policy.offload else OffloadPolicy()
    replicated = mesh.replicate_size > 1
    axes = mesh.device_mesh["replicate", "shard"] if replicated else mesh.device_mesh["shard"]
    groups = [
        fully_shard(
            block,
            mesh=axes,
            mp_policy=mixed,
            reshard_after_forward=policy.reshard_after_forward,
            offload_policy=offload,
        )
        for block in blocks_of(model)
    ]
    root = fully_shard(
        model, mesh=axes, mp_policy=mixed, reshard_after_forward=False, offload_policy=offload
    )
    if on_cuda:
        _gather_ahead([root, *groups])
    return root


def rows_before(rows: int, mesh: Mesh) -> int:
    """Number of a parameter's rows on earlier ranks of the shard axis: FSDP2 splits rows as torch.chunk does."""
    return min(rows, mesh.shard_rank * -(-rows // mesh.shard_size))


def _gather_ahead(groups: Sequence[FSDPModule]) -> None:
    """Gather the next block's weights before this block's forward is queued, not after: the host may be slow.

    In the backward FSDP2 does this by itself, in the reverse order of the forward.
    """
    for group, following in pairwise(groups):
        group.set_modules_to_forward_prefetch([following])
