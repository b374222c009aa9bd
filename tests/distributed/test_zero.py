"""DeepSpeed's stages: each equals one process, resumes from any other, and skips non-finite steps.

Stage 2 is among the engines of test_engine.py.
"""

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lmscale.engine.build import build_engine
from tests.support.engine_case import (
    LR,
    TOLERANCE,
    Case,
    assert_close,
    engine_of,
    gathered,
    interrupted,
    load_into,
    mesh_for,
    micro_batches,
    model_of,
    plain,
    reference,
    rows_of,
    train,
)

# What a head, a norm or a bias could hide: the head is the embedding, and hooks stand around biases too.
TIED = {
    "tie_embeddings": True,
    "bias": True,
    "norm": "layer",
    "positions": "learned",
    "activation": "gelu",
}
FROZEN = {"tie_embeddings": True, "trainable": ["*attention*", "*embedding*"]}


def zero(stage: int, precision: str = "fp32", **case: Any) -> Case:
    engine = {"zero_stage": stage, **case.pop("engine", {})}
    return Case("deepspeed", precision, case.pop("accumulation", 3), engine=engine, **case)


def _looked_at(case: Case) -> Any:
    """Like train; before each step the engine is looked at, which must change nothing."""
    engine = engine_of(case)
    start = gathered(engine.state())
    results, states, looks = [], [], []
    for step in range(3):
        looks.append((engine.evaluate(rows_of(0)).loss.item(), engine.logits(rows_of(0))))
        result = engine.step(micro_batches(case, step), lr=LR)
        if result.norms is not None:
            assert len(result.norms) == len(engine.block_names)
            torch.testing.assert_close(result.norms.square().sum().sqrt(), result.grad_norm)
        results.append(plain(result))
        states.append(gathered(engine.state()))
    pieces = [(weight.name, weight.piece, weight.tensor.dtype) for weight in engine.weights()]
    return start, results, states, looks, pieces


def _assert_one_process(answers: list[Any], case: Case, tolerance: float) -> None:
    results, states = reference(case, torch.float32)
    assert all(found == answers[0][1] for _, found, *_ in answers), "ranks disagree"
    _, found, after, looks, _ = answers[0]
    for step in range(3):
        assert_close(found[step], results[step], tolerance)
        assert_close(after[step], states[step], tolerance)
    model = model_of(case).eval()
    for step, (loss, logits_BLV) in enumerate(looks):
        if step:
            weights = {n.removeprefix("model."): v for n, v in after[step - 1].items()}
            model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            assert loss == pytest.approx(model(rows_of(0)).loss.item(), rel=1e-6)
            torch.testing.assert_close(logits_BLV, model.logits(rows_of(0)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "model"), [(0, FROZEN), (1, TIED), (3, TIED), (3, FROZEN)],
    ids=["0-frozen", "1-tied", "3-tied", "3-frozen"],
)  # fmt: skip
def test_a_stage_equals_one_process(ranks, stage, model):
    """What is looked at between steps too. Gradients under every option: test_gradient_pairs.py."""
    case = zero(stage, model=model, engine={"activation_checkpointing": "every:2"})
    _assert_one_process(ranks(2)(_looked_at, case), case, TOLERANCE["fp32"])


def test_two_by_two_with_sequence_parallelism_equals_one_process(ranks):
    """Products of split matrices round differently: 2e-6 (8e-6 untied)."""
    parallel = {"tp": 2, "sequence_parallel": True}
    case = zero(3, model=TIED, parallel=parallel, layer_stats=True)
    answers = ranks(4)(_looked_at, case)
    _assert_one_process(answers, case, 2 * TOLERANCE["fp32"])


def _whole(case: Case) -> list[int]:
    """Elements that this rank holds whole after each step and each look; and modules never left."""
    model = model_of(case)
    engine = build_engine(case.config(), model, mesh_for(case), torch.device("cpu"))
    stack = sys.modules["deepspeed.runtime.zero.parameter_offload"].FWD_MODULE_STACK
    found: list[int] = []
    entered = len(stack)
    for step in range(
        3
    ):  # from the second on DeepSpeed knows the order of modules, and gathers ahead
        engine.step(micro_batches(case, step), lr=LR)
        found.append(sum(p.numel() for p in model.parameters()))
        engine.evaluate(rows_of(0))
        found.append(sum(p.numel() for p in model.parameters()))
    return [*found, len(stack) - entered]


def test_stage_3_holds_on_to_norms_and_nothing_else(ranks):
    case = zero(3, engine={"activation_checkpointing": "full"})
    norms = sum(p.numel() for n, p in model_of(case).named_parameters() if "norm" in n)
    assert ranks(2)(_whole, case)[0] == [norms] * 6 + [0]


def test_stage_3_deals_out_what_does_not_divide(ranks):
    """Over three ranks every parameter has a padded last part, and some ranks nothing of a small one."""
    case = zero(
        3, accumulation=1, model={**TIED, "hidden_size": 4, "num_heads": 2, "ffn_hidden_size": 5}
    )
    results, states = reference(case, torch.float32)
    found, after = ranks(3)(train, case)[0]
    for step in range(3):
        assert_close(found[step], results[step], TOLERANCE["fp32"])
        assert_close(after[step], states[step], 2 * TOLERANCE["fp32"])


def _partly_frozen(precision: str) -> dict[str, Any]:
    """With the first loss scale the gradients of FROZEN are too large for fp16."""
    return FROZEN if precision == "bf16" else {"trainable": ["*attention*"]}


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "bf16"), (1, "bf16"), (3, "bf16"), (2, "fp16")]
)
def test_low_precision_keeps_its_masters_in_fp32(ranks, stage, precision):
    """Frozen weights too. Losses differ from fp32 by 1e-4 to 1e-3, norms by 1e-2."""
    case = zero(stage, precision, model=_partly_frozen(precision))
    results, _ = reference(case, torch.float32)
    start, found, states, _, pieces = ranks(2)(_looked_at, case)[0]
    assert all(value.dtype == torch.float32 for value in states[0].values())
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {dtype for *_, dtype in pieces} == {torch.float32 if stage == 0 else low}
    for name, value in model_of(case).named_parameters():
        assert torch.equal(start[f"model.{name}"], value), name
    assert found[0]["loss"] != pytest.approx(results[0]["loss"], rel=1e-7), "computed in fp32"
    for step in range(3):
        assert found[step]["loss"] == pytest.approx(results[step]["loss"], rel=3e-3)
        assert found[step]["norm"] == pytest.approx(results[step]["norm"], rel=3e-2)


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "bf16"), (3, "fp16")])
def test_a_resumed_stage_is_bitwise_the_uninterrupted_one(ranks, stage, precision):
    model = _partly_frozen(precision)
    case, elsewhere = (
        zero(stage, precision, model=model),
        zero(stage, precision, model=model, seed=7),
    )
    results, states = ranks(2)(train, case, range(4))[0]
    same, resumed, state, steps = ranks(2)(interrupted, case, elsewhere, 2, 2)[0]
    assert same
    assert steps == 4
    assert resumed == results[2:]
    assert all(torch.equal(state[name], value) for name, value in states[-1].items())


def _relay(cases: list[Case]) -> Any:
    """One step of each engine, which begins with what the last one left."""
    results, kept = [], None
    for step, case in enumerate(cases):
        engine = engine_of(case)
        if kept is not None:
            load_into(engine, kept, optim_step=step)
        results.append(plain(engine.step(micro_batches(case, step), lr=LR)))
        assert engine.optim_step == step + 1
        kept = gathered(engine.state())
    return results


def test_a_stage_resumes_from_the_state_of_another(ranks):
    first = zero(3)
    rest = [zero(1, seed=7), Case("ddp", accumulation=3, seed=7), zero(0, seed=7), zero(3, seed=7)]
    results, _ = reference(first, torch.float32, range(5))
    for found, expected in zip(ranks(2)(_relay, [first, *rest]), [results] * 2, strict=True):
        for step in range(5):
            assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-6)
            assert found[step]["norm"] == pytest.approx(expected[step]["norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [(1, "bf16", "optimizer"), (2, "fp32", "optimizer"), (3, "bf16", "all")],
)
def test_offload_changes_nothing(ranks, stage, precision, offload):
    case = zero(stage, precision, model=TIED, engine={"offload": offload})
    results, states = ranks(2)(train, zero(stage, precision, model=TIED))[0]
    found, after = ranks(2)(train, case)[0]
    tolerance = (
        0 if (stage, precision) != (1, "bf16") else 1e-5
    )  # another wrapper: gradients in another order
    for step in range(3):
        assert_close(found[step], results[step], tolerance)
        assert_close(after[step], states[step], tolerance)


def _poisoned(case: Case) -> Any:
    engine = engine_of(case)
    engine.step(micro_batches(case, 0), lr=LR)
    before = gathered(engine.state())
    scales = [engine.loss_scale]
    bad = micro_batches(case, 1)
    if dist.get_rank() == 1:  # one target of one rank
        bad[0].weights_BL[0, 0] = float("inf")
    skipped = plain(engine.step(bad, lr=LR))
    scales.append(engine.loss_scale)
    after = gathered(engine.state())
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    last = plain(engine.step(micro_batches(case, 2), lr=LR))
    return skipped["applied"], unchanged, engine.optim_step, last, scales


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [(0, "fp32", "none"), (1, "bf16", "none"), (1, "fp32", "optimizer"), (3, "fp16", "none")],
)
def test_a_step_with_an_infinite_gradient_changes_nothing(ranks, stage, precision, offload):
    case = zero(stage, precision, engine={"offload": offload})
    without, _ = ranks(2)(train, case, (0, 2))[0]
    for applied, unchanged, updates, last, scales in ranks(2)(_poisoned, case):
        assert applied == 0
        assert unchanged
        assert updates == 2
        # Halving is exact, so fp16 goes on as if nothing had been.
        assert last == pytest.approx(without[1], rel=1e-4)
        assert scales == ([2.0**16, 2.0**15] if precision == "fp16" else [None, None])


def _too_large(case: Case) -> Any:
    engine = engine_of(case)
    engine.finish_load(optim_step=0, loss_scale=2.0**40)
    applied = []
    while not applied or (not applied[-1] and len(applied) < 40):
        result = engine.step(micro_batches(case, 0), lr=LR)
        applied.append(bool(result.applied))
    return len(applied), engine.loss_scale, engine.optim_step, plain(result)


@pytest.mark.parametrize("stage", [0, 2])
def test_fp16_finds_a_scale_that_its_gradients_bear(ranks, stage):
    """Two ranks that overflow at different scales halve together."""
    case = zero(stage, "fp16")
    results, _ = reference(case, torch.float32, range(1))
    answers = ranks(2)(_too_large, case)
    assert answers[0] == answers[1]
    steps, scale, updates, last = answers[0]
    assert steps > 10
    assert scale == 2.0 ** (41 - steps)
    assert updates == 1
    assert last["norm"] == pytest.approx(results[0]["norm"], rel=1e-2)


def _loaded_operators(cases: list[Case]) -> list[str]:
    """Those of DeepSpeed's own that this process has loaded, and so built, in all of its life."""
    for case in cases:
        engine_of(case).step(micro_batches(case, 0), lr=LR)
    return sorted(sys.modules["deepspeed.ops.op_builder.builder"].OpBuilder._loaded_ops)


def test_nothing_is_built_at_a_start_on_a_cpu(ranks):
    """Each of its operators would take minutes and a compiler, on every node."""
    cases = [
        zero(0, "bf16"),
        zero(1, engine={"offload": "optimizer"}),
        zero(2, "fp16"),
        zero(3, "bf16", engine={"offload": "all"}),
    ]
    assert ranks(2)(_loaded_operators, cases) == [[], []]
