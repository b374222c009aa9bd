"""What each mode of activation checkpointing keeps, and that it changes no bit of a gradient."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmscale.base.batch import Batch, Stream
from lmscale.base.errors import ConfigError
from lmscale.config.schema import ModelConfig
from lmscale.model.build import build_model
from lmscale.model.transformer import LanguageModel, blocks_of
from lmscale.parallel.activation_checkpointing import (
    MODES,
    BlockCost,
    cheapest_modes,
    checkpoint_activations,
)
from lmscale.parallel.low_precision import LowPrecision

LAYERS, ROWS, LENGTH, VOCAB = 5, 2, 24, 61
CHECKPOINTED = ("full", "every:2", "selective", "budget:0.5", "budget:0.2")
STYLES = {
    "llama": {"num_kv_heads": 2},
    "gpt2": {"norm": "layer", "positions": "learned", "activation": "gelu_tanh", "bias": True},
    "post": {"norm_order": "post", "activation": "relu"},
}


def model_of(mode: str, dtype: torch.dtype = torch.float32, **changes: object) -> LanguageModel:
    sizes = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_heads": 4,
        "ffn_hidden_size": 72,
        "init_std": 0.2,
    }
    config = ModelConfig(**{**sizes, **changes})
    model = build_model(config, vocab_size=VOCAB, max_positions=LENGTH, seed=0)
    checkpoint_activations(model, mode, compute=dtype)
    return model


def batch_of(documents: bool = True) -> Batch[Tensor]:
    draw = torch.Generator().manual_seed(0)
    tokens_BL1 = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=draw)
    places_BL = torch.arange(LENGTH).repeat(ROWS, 1)
    stream = Stream(tokens_BL1[:, :-1], places_BL, places_BL // 10 if documents else None)
    weights_BL = torch.ones(ROWS, LENGTH)
    return Batch(stream, None, tokens_BL1[:, 1:], weights_BL, torch.arange(ROWS))


def gradients(model: LanguageModel, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(3)
    with LowPrecision(model, dtype)():
        model(batch_of()).loss.backward()
    # The last shows that the generator stands where it would have stood.
    return [p.grad for p in model.parameters()] + [torch.rand(1)]


@pytest.mark.parametrize(
    ("style", "dtype", "exact"),
    [
        ("llama", torch.float32, False),
        ("gpt2", torch.bfloat16, False),
        ("post", torch.bfloat16, False),
        ("llama", torch.bfloat16, True),
    ],
)
def test_every_mode_gives_the_same_bits_with_dropout(style, exact, dtype):
    changes = {**STYLES[style], "dropout": 0.3}
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(exact)
    try:
        plain = gradients(model_of("none", **changes), dtype)
        for mode in CHECKPOINTED:
            found = gradients(model_of(mode, dtype, **changes), dtype)
            assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), mode
    finally:
        torch.use_deterministic_algorithms(before)


class Made(TorchDispatchMode):
    """The memory that operators make: whose it is, and whether it is there still."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[tuple[str, StorageWeakRef, int]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for tensor in filter(_is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                self.by.append((operator.name(), StorageWeakRef(storage), storage.nbytes()))
        return out

    def kept(self) -> list[tuple[str, int]]:
        return [(name, size) for name, storage, size in self.by if not storage.expired()]


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class Reached(Exception):
    pass


def kept_by(model: LanguageModel, dtype: torch.dtype) -> list[tuple[str, int]]:
    """What lives between forward and backward because of the blocks: (operator that made it, bytes)."""
    first: list[tuple[Tensor, object]] = []
    made = Made()

    def stop(_: object, inputs: tuple[Tensor, object]) -> None:
        first.append(inputs)
        raise Reached

    with LowPrecision(model, dtype)():
        hook = blocks_of(model)[0].register_forward_pre_hook(stop)
        with pytest.raises(Reached):
            model.decoder(batch_of(documents=False).inputs)
        hook.remove()
        x_BLD, context = first.pop()
        with made:
            x_BLD = x_BLD.clone()
            for index, block in enumerate(blocks_of(model)):
                x_BLD = block(x_BLD, context.for_block(index))
            last = x_BLD.untyped_storage()._cdata
        return [
            (name, size)
            for name, storage, size in made.by
            if not storage.expired() and storage.cdata != last
        ]


@pytest.mark.parametrize(("style", "dtype"), [("llama", torch.bfloat16), ("post", torch.float32)])
def test_full_keeps_the_inputs_of_blocks_only(style, dtype):
    kept = kept_by(model_of("full", **STYLES[style], dropout=0.1), dtype)
    hidden = ROWS * LENGTH * 32 * dtype.itemsize
    assert [size for _, size in kept] == [hidden] * LAYERS


@pytest.mark.parametrize("style", STYLES)
def test_selective_keeps_inputs_products_and_attention_only(style):
    kept = kept_by(model_of("selective", **STYLES[style], dropout=0.1), torch.float32)
    products = {"aten::mm", "aten::addmm"}
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    by = [name for name, _ in kept]
    assert sum(name in products for name in by) == LAYERS * (7 if style == "llama" else 6)
    assert by.count(attention) == 2 * LAYERS  # the result and its log-sums
    inputs = [name for name in by if name not in products and name != attention]
    assert len(inputs) == LAYERS


@pytest.mark.parametrize(
    ("style", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.float32), ("post", torch.bfloat16)],
)
def test_a_budget_is_kept(style, dtype):
    """By what really lives, not by what was planned; and less than a block's share is left unused."""
    changes = {**STYLES[style], "dropout": 0.1}

    def total(mode: str) -> int:
        return sum(size for _, size in kept_by(model_of(mode, dtype, **changes), dtype))

    whole = total("none")
    for fraction in (0.35, 0.8):
        found = total(f"budget:{fraction}")
        assert fraction - 1 / LAYERS < found / whole <= fraction


def test_the_smallest_budget_is_named_and_possible():
    with pytest.raises(ConfigError, match=r"budget:0.01, but full .* keeps") as caught:
        model_of("budget:0.01")
    (problem,) = caught.value.problems
    assert problem.path == "engine.activation_checkpointing"
    smallest = problem.hint.split()[1]
    model_of(smallest)
    below = float(smallest.removeprefix("budget:")) - 0.001
    with pytest.raises(ConfigError):
        model_of(f"budget:{below:g}")


COSTS = st.builds(
    lambda none, less, least, some, all_: {
        "none": BlockCost(none, 0),
        "selective": BlockCost(none - less, some),
        "full": BlockCost(none - less - least, some + all_),
    },
    st.integers(40, 60),
    *[st.integers(0, 20) for _ in range(2)],
    *[st.integers(0, 30) for _ in range(2)],
)


@given(st.lists(COSTS, min_size=2, max_size=2), st.lists(st.integers(0, 1), max_size=5), st.data())
def test_modes_recompute_as_little_as_the_limit_allows(kinds, layers, data):
    found = [kinds[kind] for kind in layers]
    most = data.draw(st.integers(0, sum(costs["none"].saved_bytes for costs in found)))

    def total(modes) -> tuple[int, int]:
        chosen = [costs[mode] for costs, mode in zip(found, modes, strict=True)]
        return sum(cost.recomputed_operations for cost in chosen), sum(
            cost.saved_bytes for cost in chosen
        )

    possible = [total(modes) for modes in product(MODES, repeat=len(found))]
    fitting = [again for again, kept in possible if kept <= most]
    modes = cheapest_modes(found, most)
    if modes is None:
        assert not fitting
        return
    again, kept = total(modes)
    assert kept <= most
    assert again == min(fitting)
    for kind in range(2):
        mine = [
            costs[mode].saved_bytes
            for costs, mode in zip(found, modes, strict=True)
            if costs == kinds[kind]
        ]
        assert mine == sorted(mine), "of equal blocks the first ones recompute"
