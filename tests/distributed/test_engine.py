"""What every engine does beside the gradients that tests/gradients proves: resume, skip, evaluate, freeze."""

from itertools import permutations
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lmscale.base.batch import Batch
from lmscale.base.errors import DataError
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

KINDS = ["fsdp", "ddp", "deepspeed"]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_tied_and_unclipped_equal_one_process(ranks, kind):
    """The one case that clips nothing: a wrong scale of the gradient shows in both moments."""
    model = {"tie_embeddings": True, "trainable": ["*attention*", "*embedding*"]}
    case = Case(kind, accumulation=3, clip=None, model=model)
    results, states = reference(case, torch.float32)
    found, after = ranks(2)(train, case)[0]
    for step in range(3):
        assert_close(found[step], results[step], TOLERANCE["fp32"])
        assert_close(after[step], states[step], TOLERANCE["fp32"])
    assert not any(name.startswith("optim.exp_avg.decoder.norm") for name in after[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(ranks, kind):
    """In bf16, where masters and moments are fp32 and weights have to be derived from them again."""
    case = Case(kind, "bf16", accumulation=3)
    elsewhere = Case(kind, "bf16", accumulation=3, seed=7)
    results, states = ranks(2)(train, case, range(6))[0]
    same, resumed, state, steps = ranks(2)(interrupted, case, elsewhere, 3, 3)[0]
    assert same
    assert steps == 6
    assert resumed == results[3:]
    for name, value in states[-1].items():
        assert torch.equal(state[name], value), name


def test_ddp_on_three_ranks_resumes_bitwise(ranks):
    """Where sums of three depend on their order, and the order on how DDP has grouped gradients."""
    case = Case("ddp", model={"hidden_size": 320, "num_heads": 8, "ffn_hidden_size": 640})
    results, _ = ranks(3)(train, case, range(3))[0]
    _, resumed, _, _ = ranks(3)(interrupted, case, case, 2, 1)[0]
    assert resumed == results[2:]


@pytest.mark.parametrize(("first", "second"), list(permutations(KINDS, 2)))
def test_an_engine_resumes_from_the_state_of_another(ranks, first, second):
    results, _ = reference(Case(), torch.float32, range(5))
    same, resumed, _, steps = ranks(2)(interrupted, Case(first), Case(second, seed=7), 3, 2)[0]
    assert same
    assert steps == 5
    for found, expected in zip(resumed, results[3:], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)


def _poisoned(case: Case) -> Any:
    engine = engine_of(case)
    good = micro_batches(case, 0)
    bad = micro_batches(case, 1)
    if dist.get_rank() == 1:  # one target of one rank
        bad[0].weights_BL[0, 0] = float("inf")
    engine.step(good, lr=LR)
    before = gathered(engine.state())
    skipped = plain(engine.step(bad, lr=LR))
    after = gathered(engine.state())
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    last = plain(engine.step(micro_batches(case, 2), lr=LR))
    return skipped["applied"], unchanged, engine.optim_step, last


@pytest.mark.parametrize(("kind", "clip"), [*((kind, 0.05) for kind in KINDS), ("fsdp", None)])
def test_a_step_with_an_infinite_gradient_changes_nothing(ranks, kind, clip):
    case = Case(kind, accumulation=3, clip=clip)
    without, _ = ranks(2)(train, case, (0, 2))[0]
    for applied, unchanged, updates, last in ranks(2)(_poisoned, case):
        assert applied == 0
        assert unchanged
        assert updates == 2
        assert last == without[1]


def _without_targets(case: Case) -> str:
    engine = engine_of(case)
    empty = [
        Batch(b.inputs, None, b.targets_BL, torch.zeros_like(b.weights_BL), b.rows_B)
        for b in micro_batches(case, 0)
    ]
    try:
        engine.step(empty, lr=LR)
    except DataError as error:
        engine.step(micro_batches(case, 0), lr=LR)  # no rank is left waiting
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_targets_is_an_error_on_every_rank(ranks, kind):
    assert all("no target" in answer for answer in ranks(2)(_without_targets, Case(kind)))


def _looks(case: Case) -> Any:
    engine, batch = engine_of(case), rows_of(0)
    before = gathered(engine.state())
    sums, logits = engine.evaluate(batch), engine.logits(batch)
    after = gathered(engine.state())
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    results = [plain(engine.step(micro_batches(case, step), lr=LR)) for step in range(2)]
    engine.evaluate(batch)
    results.append(plain(engine.step(micro_batches(case, 2), lr=LR)))
    return sums.loss.item(), sums.weight.item(), logits, unchanged, results


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing_and_drops_nothing_out(ranks, kind):
    case = Case(kind, model={"dropout": 0.5})
    batch = rows_of(0)
    model = model_of(case).eval()
    with torch.no_grad():
        sums, logits_BLV = model(batch), model.logits(batch)
    for loss, weight, found_BLV, unchanged, _ in ranks(2)(_looks, case):
        assert unchanged
        assert loss == pytest.approx(sums.loss.item(), rel=1e-6)
        assert weight == sums.weight.item()
        torch.testing.assert_close(found_BLV, logits_BLV)
    looked = ranks(2)(_looks, Case(kind))[0][-1]
    assert looked == ranks(2)(train, Case(kind))[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_computes_in_bf16_and_keeps_its_masters_in_fp32(ranks, kind):
    """Measured against fp32: loss 1e-4 to 1e-3, norms to 1e-2; masters of the start are exact."""
    case = Case(kind, "bf16", accumulation=3)
    results, _ = reference(case, torch.float32)
    found, states = ranks(2)(train, case)[0]
    assert all(value.dtype == torch.float32 for value in states[0].values())
    assert found[0]["loss"] != pytest.approx(results[0]["loss"], rel=1e-7), "computed in fp32"
    for step in range(3):
        assert found[step]["loss"] == pytest.approx(results[step]["loss"], rel=3e-3)
        assert found[step]["norm"] == pytest.approx(results[step]["norm"], rel=3e-2)
    start = ranks(2)(_start, case)[0]
    for name, value in model_of(case).named_parameters():
        assert torch.equal(start[f"model.{name}"], value), name


def _start(case: Case) -> Any:
    return gathered(engine_of(case).state())


@pytest.mark.slow  # the compiler takes 10 s an engine and precision
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("kind", "precision"), [("fsdp", "bf16"), ("ddp", "fp32")])
def test_compiled_blocks_give_the_same(ranks, kind, precision):
    """Within what fused kernels round differently; with checkpointing inside the graph."""
    engine = {"compile": True, "activation_checkpointing": "every:2"}
    results, _ = ranks(2)(train, Case(kind, precision, 3), deadline_s=400)[0]
    found, _ = ranks(2)(train, Case(kind, precision, 3, engine=engine), deadline_s=400)[0]
    for step in range(3):
        assert_close(found[step], results[step], {"fp32": 5e-6, "bf16": 2e-2}[precision])
