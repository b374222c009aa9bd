"""Copies, shards and tensor parallelism of ddp and fsdp: four ranks in any layout are one process."""

import gc
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lmscale.engine import base
from lmscale.engine.layout import block_name
from tests.support.engine_case import (
    LR,
    TOLERANCE,
    Case,
    assert_close,
    engine_of,
    gathered,
    interrupted,
    micro_batches,
    model_of,
    plain,
    reference,
    rows_of,
    train,
)

TP = {"tp": 2, "sequence_parallel": True}
# 54: a tp rank has 27 rows of a matrix, which two ranks cannot share evenly
GPT2 = {
    "norm": "layer", "positions": "learned", "activation": "gelu_tanh", "bias": True, "tie_embeddings": True,
    "ffn_hidden_size": 54,
}  # fmt: skip
LAYOUTS = {
    "hsdp": Case("fsdp", "fp64", 3, parallel={"dp_replicate": 2}, layer_stats=True),
    "ddp-tp": Case("ddp", "fp64", 3, model=GPT2, parallel=TP, layer_stats=True),
    "fsdp-tp": Case("fsdp", "fp64", 3, model=GPT2, parallel=TP, layer_stats=True),
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Seen(NamedTuple):
    """By one rank."""

    evaluated: tuple[float, float]
    logits: Tensor
    results: list[dict[str, float]]
    states: list[dict[str, Tensor]]
    norms: dict[str, float]  # of the first step
    pieces: dict[tuple[str, str], Tensor]


def _look_and_train(case: Case) -> Seen:
    engine = engine_of(case)
    sums, logits = engine.evaluate(rows_of(0)), engine.logits(rows_of(0))
    steps, states = [], []
    for step in range(3):
        steps.append(engine.step(micro_batches(case, step), lr=LR))
        states.append(gathered(engine.state()))
    assert steps[0].norms is not None
    norms = dict(zip(engine.block_names, steps[0].norms.tolist(), strict=True))
    pieces = {(found.name, found.piece): found.tensor.clone() for found in engine.weights()}
    evaluated = (sums.loss.item(), sums.weight.item())
    return Seen(evaluated, logits, [plain(result) for result in steps], states, norms, pieces)


@pytest.mark.parametrize("name", LAYOUTS)
def test_four_ranks_equal_one_process(ranks, name):
    case = LAYOUTS[name]
    tolerance = TOLERANCE[case.precision]
    results, states = reference(case, DTYPES[case.precision])
    seen = ranks(4)(_look_and_train, case)
    model = model_of(case).to(DTYPES[case.precision]).eval()
    with torch.no_grad():
        sums, logits_BLV = model(rows_of(0)), model.logits(rows_of(0))
    for found in seen:
        assert (found.evaluated, found.results, found.norms) == (
            seen[0].evaluated,
            seen[0].results,
            seen[0].norms,
        ), "ranks disagree"
        assert torch.equal(found.logits, seen[0].logits)
    assert seen[0].evaluated == pytest.approx((sums.loss.item(), sums.weight.item()), rel=1e-6)
    torch.testing.assert_close(seen[0].logits, logits_BLV)
    for step in range(3):
        assert_close(seen[0].results[step], results[step], tolerance)
        assert_close(seen[0].states[step], states[step], tolerance)
    assert seen[0].norms == pytest.approx(_norms(case, results[0], states[0]), rel=tolerance)
    _assert_pieces_make_the_model(seen, model)


def _norms(case: Case, result: dict[str, float], state: dict[str, Tensor]) -> dict[str, float]:
    """Of each part, before clipping, from the first moments of the first step."""
    assert case.clip is not None
    squares: dict[str, float] = {}
    for name, moment in state.items():
        if name.startswith("optim.exp_avg."):
            part = block_name(name.removeprefix("optim.exp_avg."))
            squares[part] = squares.get(part, 0) + moment.double().square().sum().item()
    scale = (1 - case.config().optim.betas[0]) * case.clip / (result["norm"] + 1e-6)
    return {part: square**0.5 / scale for part, square in squares.items()}


def _assert_pieces_make_the_model(seen: list[Seen], model: torch.nn.Module) -> None:
    """Equal pieces are equal, and the different ones of a parameter have as many elements as it has."""
    distinct: dict[tuple[str, str], Tensor] = {}
    for found in seen:
        for key, tensor in found.pieces.items():
            assert torch.equal(distinct.setdefault(key, tensor), tensor), key
    elements: dict[str, int] = {}
    for (name, _), tensor in distinct.items():
        elements[name] = elements.get(name, 0) + tensor.numel()
    assert elements == {name: prod(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Case("ddp", parallel=TP), Case("fsdp", seed=7)),
        (Case("fsdp", parallel={"dp_replicate": 2}), Case("fsdp", seed=7, parallel=TP)),
    ],
    ids=["ddp-tp-to-fsdp", "hsdp-to-fsdp-tp"],
)
def test_a_layout_resumes_from_the_state_of_another(ranks, first, second):
    results, _ = reference(Case(), torch.float32, range(5))
    same, resumed, _, steps = ranks(4)(interrupted, first, second, 3, 2)[0]
    assert same
    assert steps == 5
    for found, expected in zip(resumed, results[3:], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "parallel"), [("fsdp", {"dp_replicate": 2}), ("ddp", TP)], ids=["hsdp", "ddp-tp"]
)
def test_a_resumed_layout_is_bitwise_the_uninterrupted_one(ranks, kind, parallel):
    """In bf16 with a tied embedding: copies in low precision of what a tp rank holds."""
    case = Case(kind, "bf16", 3, parallel=parallel, model={"tie_embeddings": True})
    results, states = ranks(4)(train, case, range(3))[0]
    same, resumed, state, _ = ranks(4)(interrupted, case, case, 2, 1)[0]
    assert same
    assert resumed == results[2:]
    assert all(torch.equal(state[name], value) for name, value in states[-1].items())


def _planted(case: Case) -> Any:
    """Inf in one element of what only the last rank updates, after every reduction of gradients."""
    engine: Any = engine_of(case)
    engine.step(micro_batches(case, 0), lr=LR)
    before = gathered(engine.state())
    (victim,) = [t for t in engine._parameters if t.name == "decoder.blocks.1.attention.q.weight"]
    real = base.sum_partial_gradients

    def plant(*args: Any) -> None:
        real(*args)
        if dist.get_rank() == 3:
            victim.local.grad.view(-1)[0] = torch.inf

    with patch.object(base, "sum_partial_gradients", plant):
        skipped = plain(engine.step(micro_batches(case, 1), lr=LR))
    after = gathered(engine.state())
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    last = plain(engine.step(micro_batches(case, 2), lr=LR))
    return skipped["applied"], unchanged, engine.optim_step, last


@pytest.mark.parametrize(
    ("kind", "parallel"), [("ddp", TP), ("fsdp", {**TP, "dp_replicate": 2})], ids=["ddp", "hsdp"]
)
def test_inf_on_one_tp_rank_skips_the_step_everywhere(ranks, kind, parallel):
    case = Case(kind, accumulation=3, parallel=parallel)
    without, _ = ranks(4)(train, case, (0, 2))[0]
    for applied, unchanged, updates, last in ranks(4)(_planted, case):
        assert applied == 0
        assert unchanged
        assert updates == 2
        assert last == without[1]


def test_bf16_gradients_are_added_up_and_reduced_in_fp32(ranks):
    """Both engines compute the same gradients in bf16; a sum in bf16 would be off by 4e-3."""
    _, states = ranks(4)(train, Case("ddp", "bf16", 3), range(1))[0]
    _, after = ranks(4)(train, Case("fsdp", "bf16", 3, parallel={"dp_replicate": 2}), range(1))[0]
    assert_close(after[0], states[0], 1e-5)


class _Watched(list):
    """Micro-batches; bytes of all tensors of this process, each time one is asked for."""

    def __iter__(self) -> Iterator[Any]:
        self.held: list[int] = []
        for batch in super().__iter__():
            gc.collect()
            storages = {
                storage.data_ptr(): storage.nbytes()
                for found in gc.get_objects()
                if type(found) in (Tensor, torch.nn.Parameter)
                for storage in [found.untyped_storage()]
            }
            self.held.append(sum(storages.values()))
            yield batch


def _kept(case: Case) -> tuple[float, float]:
    """Bytes that a rank has more after two of three micro-batches, and those of the weights it updates."""
    engine: Any = engine_of(case)
    engine.step(micro_batches(case, 0), lr=LR)
    batches = _Watched(micro_batches(case, 1))
    engine.step(batches, lr=LR)
    first, _, third = batches.held
    return third - first, sum(trained.local.nbytes for trained in engine._parameters)


@pytest.mark.parametrize(
    ("case", "share"),
    [
        (Case("fsdp", accumulation=3, parallel={"dp_replicate": 2}), 1),
        (Case("fsdp", "bf16", accumulation=3), 1),
        (Case("ddp", accumulation=3), 0),  # they are added up in the buckets, which stand anyway
    ],
    ids=["hsdp", "fsdp-bf16", "ddp"],
)
def test_gradients_between_micro_batches_take_no_more_than_a_shard(ranks, case, share):
    for more, own in ranks(4)(_kept, case):
        assert more == pytest.approx(share * own, abs=0.05 * own)
