"""Activation checkpointing: save less of a forward and recompute it in the backward.

    mode              a block saves                                         and recomputes
    none              what its backward reads                               nothing
    selective         its input, results of matrix products, of attention   norms, activations, rotation, dropout
                      kernels and of collectives
    full              its input                                             all of it, collectives too
    every:N           blocks 0, N, 2N, ... full, the others none
    budget:FRACTION   a mode for each block, so that at most FRACTION of what `none` saves is saved and as few
                      operations as possible are recomputed

The second forward draws the dropout of the first: torch restores its generators around it.

For a budget, blocks are measured before anything is trained: a forward and a backward on fake tensors, which
have sizes and no memory, show which tensors outlive the forward and how many operations the backward adds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lmscale.base.batch import Stream
from lmscale.base.errors import ConfigError, Problem
from lmscale.model.layers import replace_forward
from lmscale.model.transformer import blocks_of
from lmscale.modelspec.activations import RecomputeMode

MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")


def checkpoint_activations(
    model: nn.Module, setting: str, *, compute: torch.dtype = torch.float32
) -> None:
    """Apply `setting` (engine.activation_checkpointing) to the forward of each block.

    After tensors are split, before compilation. Not collective; all ranks decide the same. compute: the type
    of the activations. Only budget reads it, and raises ConfigError when no mode saves that little.
    """
    for block, mode in zip(blocks_of(model), _modes(model, setting, compute), strict=True):
        replace_forward(block, checkpointed(block.forward, mode))


def _modes(model: nn.Module, setting: str, compute: torch.dtype) -> list[RecomputeMode]:
    num_blocks = len(blocks_of(model))
    match setting.split(":"):
        case ["none" | "selective" | "full" as mode]:
            return [mode] * num_blocks
        case ["every", step]:
            return ["none" if index % int(step) else "full" for index in range(num_blocks)]
        case ["budget", fraction]:
            return modes_within_budget(measured_costs(model, compute), fraction)
    raise AssertionError(f"activation_checkpointing {setting!r} passed the config check")


def checkpointed(forward: Callable[..., Any], mode: RecomputeMode) -> Callable[..., Any]:
    """The same function, saving for its backward what the mode says. Arguments by position."""
    match mode:
        case "none":
            return forward
        case "full":
            options: dict[str, Any] = {}
        case "selective":
            options = {"context_fn": _selective_contexts}

    @wraps(forward)
    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options)

    return run


# Saved operators of `selective`, by name, as no list of overloads is complete on every device. A compiled region
# inside a block that is not compiled itself can only be FlexAttention.
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"})
_ATTENTION = ("aten::_scaled_dot_product_", "flex_attention", "inductor_compiled_code")
_COLLECTIVES = "_c10d_functional::"


def _selective_contexts() -> tuple[Any, Any]:
    first, second = create_selective_checkpoint_contexts(_policy)
    return first, _SecondForward(second)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _saved(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _saved(operator: Any) -> bool:
    name = operator.name()
    return name in _PRODUCTS or name.startswith((*_ATTENTION, _COLLECTIVES))


class _SecondForward(TorchDispatchMode):
    """The recomputation: results of saved operators come from torch's own mode, the rest is computed.

    Torch's mode expects every operator of the first forward in the same order. ZeRO-3 breaks that: it gathers
    weights inside a block, ahead of use and therefore in another order. So only saved operators are passed to it.
    """

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self, saved_results: TorchDispatchMode):
        super().__init__()
        self._saved_results = saved_results

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # as torch's own mode does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _saved(func):
            return self._saved_results.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class BlockCost:
    """The cost of one block in one mode."""

    saved_bytes: int  # from the forward to the backward; includes the block's input, not its output
    recomputed_operations: int


BlockCosts = Mapping[RecomputeMode, BlockCost]


def modes_within_budget(blocks: Sequence[BlockCosts], fraction: str) -> list[RecomputeMode]:
    """A mode for each block, or ConfigError naming the smallest possible fraction."""
    without = sum(costs["none"].saved_bytes for costs in blocks)
    modes = cheapest_modes(blocks, int(Fraction(fraction) * without))
    if modes is not None:
        return modes
    minimum = sum(min(cost.saved_bytes for cost in costs.values()) for costs in blocks)
    smallest = -(-1000 * minimum // without) / 1000  # rounded up
    fact = f"budget:{fraction}, but full recomputation keeps {minimum / without:.1%} of the activations"
    hint = f"use budget:{smallest:g} or more, or full"
    raise ConfigError([Problem("engine.activation_checkpointing", fact, hint)])


def cheapest_modes(blocks: Sequence[BlockCosts], limit: int) -> list[RecomputeMode] | None:
    """The mode of each block: at most `limit` bytes saved, with as few operations recomputed as possible.

    None where nothing fits. Of equal blocks the first ones recompute: when the backward reaches them, what the
    other blocks saved has been freed.
    """
    # All choices for the blocks so far that no other choice beats in both memory and operations, by memory.
    # The last element links the modes, newest first.
    front: list[tuple[int, int, tuple[Any, ...]]] = [(0, 0, ())]
    for costs in blocks:
        choices = [
            (
                saved + cost.saved_bytes,
                operations + cost.recomputed_operations,
                (mode, previous),
            )
            for saved, operations, previous in front
            for mode, cost in costs.items()
            if saved + cost.saved_bytes <= limit
        ]
        choices.sort(key=lambda choice: choice[:2])
        front = []
        for choice in choices:
            if not front or choice[1] < front[-1][1]:  # more memory only for fewer operations
                front.append(choice)
    if not front:
        return None
    modes: list[RecomputeMode] = []
    link = front[-1][2]
    while link:
        mode, link = link
        modes.append(mode)
    return _first_blocks_recompute(blocks, modes[::-1])


def _first_blocks_recompute(
    blocks: Sequence[BlockCosts], modes: list[RecomputeMode]
) -> list[RecomputeMode]:
    ordered = list(modes)
    for costs in {id(costs): costs for costs in blocks}.values():
        equal = [index for index, other in enumerate(blocks) if other == costs]
        by_memory = sorted(
            (modes[index] for index in equal), key=lambda mode: costs[mode].saved_bytes
        )
        for index, mode in zip(equal, by_memory, strict=True):
            ordered[index] = mode
    return ordered


def measured_costs(model: nn.Module, compute: torch.dtype) -> list[BlockCosts]:
    """The costs of each block of a language model, for one row of the greatest length.

    Takes a second or two, and no memory. Without a mask: a mask is shared by all blocks, or, where a CPU's
    kernel copies it, makes the real costs higher. Not collective, although tp ranks' collectives are traced.
    """
    measured: dict[Any, BlockCosts] = {}
    costs = []
    with FakeTensorMode():
        inputs = _inputs_of_blocks(model, compute)
        for block in blocks_of(model):
            shapes = tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters())
            if shapes not in measured:
                measured[shapes] = _measure(block, inputs, compute)
            costs.append(measured[shapes])
    return costs


class _FirstBlockReached(Exception):
    """Ends the forward of the decoder at its first block."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs


def _inputs_of_blocks(model: nn.Module, compute: torch.dtype) -> tuple[Any, ...]:
    """What the decoder passes to its first block."""

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise _FirstBlockReached(inputs)

    decoder = model.get_submodule("decoder")
    length = cast(Any, decoder).spec.max_positions
    device = next(model.parameters()).device
    zeros_BL = torch.zeros(1, length, dtype=torch.int64, device=device)
    hook = blocks_of(model)[0].register_forward_pre_hook(stop)
    try:
        functional_call(
            decoder, _fake_parameters(decoder, compute), (Stream(zeros_BL, zeros_BL, None),)
        )
    except _FirstBlockReached as reached:
        return reached.inputs
    finally:
        hook.remove()
    raise AssertionError("the decoder calls none of its blocks")


def _measure(block: nn.Module, inputs: tuple[Any, ...], compute: torch.dtype) -> BlockCosts:
    x, *rest = inputs
    parameters = _fake_parameters(block, compute)

    def forward(x: Tensor, *rest: Any) -> Any:
        return functional_call(block, parameters, (x, *rest))

    measured = {}
    for mode in MODES:
        recorder = _OperatorRecorder()
        with recorder:
            # Not a leaf, so that it is freed when the block does not save it.
            y = checkpointed(forward, mode)(x.detach().requires_grad_().clone(), *rest)
            saved = recorder.live_bytes() - y.untyped_storage().nbytes()
            y.backward(torch.ones_like(y))
        measured[mode] = BlockCost(saved, recorder.operations)
    without = measured["none"].recomputed_operations
    return {
        mode: BlockCost(cost.saved_bytes, cost.recomputed_operations - without)
        for mode, cost in measured.items()
    }


def _fake_parameters(module: nn.Module, compute: torch.dtype) -> dict[str, Tensor]:
    return {
        name: torch.empty(p.shape, dtype=compute, device=p.device, requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
    }


class _OperatorRecorder(TorchDispatchMode):
    """Counts operations and records every storage that an operator allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self._allocated: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        inputs = {_address(tensor) for tensor in _tensors((args, kwargs))}
        allocated = [tensor for tensor in _tensors(out) if _address(tensor) not in inputs]
        for tensor in allocated:
            storage = tensor.untyped_storage()
            self._allocated.append((StorageWeakRef(storage), storage.nbytes()))
        if allocated:
            self.operations += _operations(operator.name(), args, allocated[0])
        return out

    def live_bytes(self) -> int:
        """Bytes of the recorded storages that have not been freed."""
        return sum(size for storage, size in self._allocated if not storage.expired())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _operations(name: str, args: Any, out: Tensor) -> int:
    """A multiply-add counts 2, an element of anything else 1. Backwards may be inexact: they cancel."""
    if name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
        return 2 * out.numel() * args[-2].shape[-1]
    if name.startswith("aten::_scaled_dot_product") and "backward" not in name:
        query_BNLH, key_BKLH = args[:2]
        return 4 * query_BNLH.numel() * key_BKLH.shape[-2]
    return out.numel()
