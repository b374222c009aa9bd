"""Which blocks recompute how much, so that a share of the memory is enough and least is computed twice.

Blocks are measured before there is anything to train: a forward and a backward on fake tensors, which have
sizes and no memory, tell which tensors outlive the forward and how many operations the backward adds.

Activation checkpointing: keep less of a forward and compute it again in the backward.

    mode              a block keeps                                         and computes again
    none              what its backward reads                               nothing
    selective         its input, results of matrix products, of attention   norms, activations, rotation, dropout
                      kernels and of collectives
    full              its input                                             all of it, collectives too
    every:N           blocks 0, N, 2N, ... full, the others none
    budget:FRACTION   a mode for each block, so that FRACTION of what none keeps is enough (budget.py)

The second forward draws the dropout of the first: torch restores its generators around it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import wraps
from typing import Any, Literal, cast

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
from lmscale.parallel.blocks import blocks, set_forward

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = ("none", "selective", "full")
Recomputing = Callable[[Callable[..., Any], Mode], Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Of one block in one mode."""

    kept: int  # bytes from the forward to the backward; the block's input counts, its output is the next one's
    again: int  # operations that the backward repeats


Costs = Mapping[Mode, BlockCost]


def within_budget(found: Sequence[Costs], fraction: str) -> list[Mode]:
    """A mode for each block, or ConfigError naming the smallest fraction there is."""
    whole = sum(costs["none"].kept for costs in found)
    chosen = choose(found, int(Fraction(fraction) * whole))
    if chosen is not None:
        return chosen
    least = sum(min(cost.kept for cost in costs.values()) for costs in found)
    smallest = -(-1000 * least // whole) / 1000  # rounded up
    fact = f"budget:{fraction}, but full recomputation keeps {least / whole:.1%} of the activations"
    hint = f"use budget:{smallest:g} or more, or full"
    raise ConfigError([Problem("engine.activation_checkpointing", fact, hint)])


def choose(found: Sequence[Costs], most: int) -> list[Mode] | None:
    """The mode of each block: at most `most` bytes kept, then least computed again. None: nothing fits.

    Of equal blocks the first ones recompute: when their turn comes in the backward, what the others kept is
    gone already and makes room.
    """
    front: list[tuple[int, int, tuple[Any, ...]]] = [(0, 0, ())]
    for costs in found:
        longer = [
            (kept + cost.kept, again + cost.again, (mode, before))
            for kept, again, before in front
            for mode, cost in costs.items()
            if kept + cost.kept <= most
        ]
        longer.sort(key=lambda state: state[:2])
        front = []
        for state in longer:
            if not front or state[1] < front[-1][1]:  # more memory only for less work
                front.append(state)
    if not front:
        return None
    modes: list[Mode] = []
    link = front[-1][2]
    while link:
        mode, link = link
        modes.append(mode)
    return _first_ones_recompute(found, modes[::-1])


def _first_ones_recompute(found: Sequence[Costs], modes: list[Mode]) -> list[Mode]:
    ordered = list(modes)
    for costs in {id(costs): costs for costs in found}.values():
        places = [index for index, other in enumerate(found) if other == costs]
        again = sorted((modes[place] for place in places), key=lambda mode: costs[mode].kept)
        for place, mode in zip(places, again, strict=True):
            ordered[place] = mode
    return ordered


def costs_of(model: nn.Module, compute: torch.dtype, recomputing: Recomputing) -> list[Costs]:
    """Of each block of a LanguageModel in each mode, for one row of its greatest length.

    Takes a second or two, and no memory. Without a mask: a mask is shared by all blocks, or, where a CPU's
    kernel copies it, a reason to keep less than is said here. Not collective, although tp ranks' collectives
    are traced.
    """
    known: dict[Any, Costs] = {}
    found = []
    with FakeTensorMode():
        inputs = _inputs_of_blocks(model, compute)
        for block in blocks(model):
            kind = tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters())
            if kind not in known:
                known[kind] = _costs(block, inputs, compute, recomputing)
            found.append(known[kind])
    return found


class _Reached(Exception):
    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs


def _inputs_of_blocks(model: nn.Module, compute: torch.dtype) -> tuple[Any, ...]:
    """What the decoder hands to its first block."""

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise _Reached(inputs)

    decoder = model.get_submodule("decoder")
    length = cast(Any, decoder).arch.max_positions
    device = next(model.parameters()).device
    zeros_BL = torch.zeros(1, length, dtype=torch.int64, device=device)
    hook = blocks(model)[0].register_forward_pre_hook(stop)
    try:
        functional_call(
            decoder, _fake_parameters(decoder, compute), (Stream(zeros_BL, zeros_BL, None),)
        )
    except _Reached as reached:
        return reached.inputs
    finally:
        hook.remove()
    raise AssertionError("the decoder calls none of its blocks")


def _costs(
    block: nn.Module, inputs: tuple[Any, ...], compute: torch.dtype, recomputing: Recomputing
) -> Costs:
    x, *rest = inputs
    parameters = _fake_parameters(block, compute)

    def forward(x: Tensor, *rest: Any) -> Any:
        return functional_call(block, parameters, (x, *rest))

    measured = {}
    for mode in MODES:
        watch = _Watch()
        with watch:
            # Not a leaf: it must go when the block does not keep it.
            y = recomputing(forward, mode)(x.detach().requires_grad_().clone(), *rest)
            kept = watch.alive() - y.untyped_storage().nbytes()
            y.backward(torch.ones_like(y))
        measured[mode] = BlockCost(kept, watch.operations)
    plain = measured["none"].again
    return {mode: BlockCost(cost.kept, cost.again - plain) for mode, cost in measured.items()}


def _fake_parameters(module: nn.Module, compute: torch.dtype) -> dict[str, Tensor]:
    return {
        name: torch.empty(p.shape, dtype=compute, device=p.device, requires_grad=p.requires_grad)
        for name, p in module.named_parameters()
    }


class _Watch(TorchDispatchMode):
    """Counts operations, and remembers every piece of memory that an operator has made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self._made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(out) if _address(tensor) not in given]
        for tensor in made:
            storage = tensor.untyped_storage()
            self._made.append((StorageWeakRef(storage), storage.nbytes()))
        if made:
            self.operations += _operations(operator.name(), args, made[0])
        return out

    def alive(self) -> int:
        """Bytes that somebody still holds of what was made."""
        return sum(size for storage, size in self._made if not storage.expired())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _operations(name: str, args: Any, out: Tensor) -> int:
    """A multiply-add counts 2, an element of anything else 1. Backwards need no right number: they cancel."""
    if name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
        return 2 * out.numel() * args[-2].shape[-1]
    if name.startswith("aten::_scaled_dot_product") and "backward" not in name:
        query_BNLH, key_BKLH = args[:2]
        return 4 * query_BNLH.numel() * key_BKLH.shape[-2]
    return out.numel()


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
