"""Activation checkpointing: keep less of a forward and compute it again in the backward.

    mode              a block keeps                                         and computes again
    none              what its backward reads                               nothing
    selective         its input, results of matrix products, of attention   norms, activations, rotation, dropout
                      kernels and of collectives
    full              its input                                             all of it, collectives too
    every:N           blocks 0, N, 2N, ... full, the others none
    budget:FRACTION   a mode for each block, so that FRACTION of what none keeps is enough (budget.py)

The second forward draws the dropout of the first: torch restores its generators around it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lmscale.parallel.blocks import blocks, set_forward
from lmscale.parallel.budget import Mode, costs_of, within_budget


def checkpoint_activations(
    model: nn.Module, mode: str, *, compute: torch.dtype = torch.float32
) -> None:
    """Set the forward of each block to what `mode` (engine.activation_checkpointing) asks for.

    After tensors are split, before compilation. Not collective; all ranks decide the same. compute: the type
    that activations will have. Only budget reads it, and raises ConfigError when no mode keeps that little.
    """
    for block, kept in zip(blocks(model), _modes(model, mode, compute), strict=True):
        set_forward(block, recomputing(block.forward, kept))


def recomputing(forward: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    """The same function, keeping for its backward what the mode says. Arguments by position."""
    match mode:
        case "none":
            return forward
        case "full":
            options: dict[str, Any] = {}
        case "selective":
            options = {"context_fn": _contexts}

    @wraps(forward)
    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options)

    return run


def _modes(model: nn.Module, mode: str, compute: torch.dtype) -> list[Mode]:
    count = len(blocks(model))
    match mode.split(":"):
        case ["none" | "selective" | "full" as same]:
            return [same] * count
        case ["every", step]:
            return ["none" if index % int(step) else "full" for index in range(count)]
        case ["budget", fraction]:
            return within_budget(costs_of(model, compute, recomputing), fraction)
    raise AssertionError(f"activation_checkpointing {mode!r} passed the config check")


# By name, as no list of overloads is complete on every device. A compiled region inside a block that is not
# compiled itself can only be FlexAttention.
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"})
_ATTENTION = ("aten::_scaled_dot_product_", "flex_attention", "inductor_compiled_code")
_COLLECTIVES = "_c10d_functional::"


def _kept(operator: Any) -> bool:
    name = operator.name()
    return name in _PRODUCTS or name.startswith((*_ATTENTION, _COLLECTIVES))


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if _kept(operator):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class _Again(TorchDispatchMode):
    """The second forward. Torch's own mode wants every operator of the first one, in its order.

    That is more than holds: ZeRO-3 gathers weights inside a block, ahead of use and hence otherwise than before.
    So it is asked for what was kept, and for nothing else.
    """

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self, torchs: TorchDispatchMode):
        super().__init__()
        self._torchs = torchs

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # as torch's own does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _kept(func):
            return self._torchs.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _contexts() -> tuple[Any, Any]:
    first, again = create_selective_checkpoint_contexts(_policy)
    return first, _Again(again)
