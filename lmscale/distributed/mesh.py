"""How ranks are laid out: the axes replicate, shard and tp, outermost first.

rank = (replicate_rank * shard + shard_rank) * tp + tp_rank, so the ranks of one TP group are
neighbours and share a host.
"""

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lmscale.base.errors import ConfigError, Problem
from lmscale.base.world import World
from lmscale.distributed.process_group import DEADLINE_S, collective

AXES = ("replicate", "shard", "tp")


class AxisSizes(Protocol):
    """Axis sizes as the run file gives them (ParallelConfig)."""

    @property
    def dp_replicate(self) -> int: ...  # noqa: D102
    @property
    def dp_shard(self) -> int | Literal["auto"]: ...  # noqa: D102
    @property
    def tp(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's position on the axes, and the groups of the ranks along them.

    Data parallel (dp) = replicate x shard: the ranks that see different samples.
    """

    world: World
    device_mesh: (
        DeviceMesh  # axes AXES; every one of its groups ends a collective after the deadline
    )
    dp_group: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    tp_rank: int
    tp_size: int
    replicate_size: int
    shard_rank: int
    shard_size: int


def resolve(sizes: AxisSizes, world_size: int) -> tuple[int, int, int]:
    """Replace `dp_shard: auto` by the ranks left over; (replicate, shard, tp). Raises ConfigError."""
    shard = sizes.dp_shard
    if shard == "auto":
        shard = world_size // (sizes.dp_replicate * sizes.tp)
    shape = (sizes.dp_replicate, shard, sizes.tp)
    if shard < 1 or math.prod(shape) != world_size:
        fact = f"dp_replicate {sizes.dp_replicate} x dp_shard {sizes.dp_shard} x tp {sizes.tp}"
        raise ConfigError(
            [
                Problem(
                    "parallel",
                    f"{fact} cannot fill {world_size} rank(s)",
                    "keep parallel.dp_shard=auto and let dp_replicate x tp divide the number of ranks",
                )
            ]
        )
    return shape


def make_mesh(
    sizes: AxisSizes, world: World, device_type: str, *, timeout_s: float = DEADLINE_S
) -> Mesh:
    """Lay out all ranks. Collective: every rank makes every group, in the same order."""
    shape = resolve(sizes, world.size)
    ranks = torch.arange(world.size).reshape(shape)
    with collective(f"rank {world.rank}: making the groups of mesh {shape}"):
        groups = [_group_along((axis,), ranks, world.rank, timeout_s) for axis in range(3)]
        dp_group = _group_along((0, 1), ranks, world.rank, timeout_s)
        mesh = DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=AXES)
    replicate, shard, tp = shape
    dp_rank, tp_rank = divmod(world.rank, tp)
    return Mesh(
        world=world,
        device_mesh=mesh,
        dp_group=dp_group,
        dp_rank=dp_rank,
        dp_size=replicate * shard,
        tp_group=groups[2],
        tp_rank=tp_rank,
        tp_size=tp,
        replicate_size=replicate,
        shard_rank=dp_rank % shard,
        shard_size=shard,
    )


def _group_along(
    axes: tuple[int, ...], ranks: torch.Tensor, rank: int, timeout_s: float
) -> dist.ProcessGroup:
    """This rank's group along `axes`; new_group sets the deadline, whose default is 30 min."""
    if math.prod(ranks.shape[axis] for axis in axes) == ranks.numel():
        world_group = dist.group.WORLD
        assert world_group is not None, "make_mesh needs `with distributed(...)`"
        return world_group
    others = [axis for axis in range(ranks.dim()) if axis not in axes]
    mine: dist.ProcessGroup | None = None
    for members in ranks.permute(*others, *axes).flatten(-len(axes)).flatten(0, -2).tolist():
        group = dist.new_group(members, timeout=timedelta(seconds=timeout_s))
        if rank in members:
            mine = group
    assert mine is not None, f"rank {rank} is in no group along {axes}"
    return mine
