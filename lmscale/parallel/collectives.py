"""Collectives of tensor-parallel ranks inside a forward, each with its backward.

    function        forward                   backward
    leave_region    sum over ranks            identity
    enter_region    identity                  sum over ranks
    scatter_tokens  sum, keep this rank's     gather_tokens
    gather_tokens   parts to whole            scatter_tokens

Megatron's pairs g and f (arXiv:1909.08053, figure 3) and, with sequence parallelism, g-bar and its transpose
(arXiv:2205.05198, figure 5). All are collective over the tp group; every tp rank must call them. They are
operators that torch.compile traces (torch.ops._c10d_functional, which DTensor uses too), so that a compiled
block has no graph break.

Shapes: B rows, L tokens, l = L / tp tokens of this rank, D hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_collectives = torch.ops._c10d_functional


def sum_ranks(tensor: Tensor, group: dist.ProcessGroup, op: str = "sum") -> Tensor:
    """The reduction `op` over the group, as a new tensor. No gradient. Collective."""
    pending = _collectives.all_reduce(tensor.contiguous(), op, group.group_name)
    reduced: Tensor = _collectives.wait_tensor(pending)
    return reduced


def gather_last(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' tensors along the last dimension, in the order of ranks. No gradient. Collective."""
    parts = _gathered(tensor.movedim(-1, 0), group)
    return parts.movedim(0, -1)


def enter_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The input of a region in which each rank computes with its part of the weights. Collective in the backward."""
    entered: Tensor = _Enter.apply(x, group)
    return entered


def leave_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The output of a region: the sum of the ranks' results. Collective."""
    left: Tensor = _Leave.apply(x, group)
    return left


def gather_tokens(x_BlD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, l, D] of each rank -> [B, L, D]: the input of a region under sequence parallelism. Collective."""
    x_BLD: Tensor = _GatherTokens.apply(x_BlD, group)
    return x_BLD


def scatter_tokens(x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L, D] -> this rank's tokens [B, l, D] of the sum over ranks: the output of a region. Collective."""
    x_BlD: Tensor = _ScatterTokens.apply(x_BLD, group)
    return x_BlD


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_ranks(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return sum_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BlD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _whole_of(x_BlD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _part_of_sum(grads[0], ctx.group), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _part_of_sum(x_BLD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _whole_of(grads[0], ctx.group), None


def _whole_of(x_BlD: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _gathered(x_BlD.transpose(0, 1), group).transpose(0, 1).contiguous()


def _part_of_sum(x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
    x_LBD = x_BLD.transpose(0, 1).contiguous()
    pending = _collectives.reduce_scatter_tensor(x_LBD, "sum", group.size(), group.group_name)
    x_lBD: Tensor = _collectives.wait_tensor(pending)
    return x_lBD.transpose(0, 1).contiguous()


def _gathered(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' tensors along the first dimension."""
    pending = _collectives.all_gather_into_tensor(
        parts.contiguous(), group.size(), group.group_name
    )
    whole: Tensor = _collectives.wait_tensor(pending)
    return whole
