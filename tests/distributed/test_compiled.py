"""Compiled and recomputed blocks over several ranks: one graph with its collectives, and the same gradients."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmscale.parallel.activation_checkpointing import checkpoint_activations
from lmscale.parallel.passes import compile_blocks
from lmscale.parallel.tensor import split_tensors
from tests.support.engine_case import (
    LR,
    Case,
    engine_of,
    mesh_of,
    micro_batches,
    model_of,
    plain,
    rows_of,
)

MODEL = {"num_layers": 4, "dropout": 0.2}
# Everything of the compiler but its C++, which takes ten seconds a graph.
CHEAP = partial(torch.compile, backend="aot_eager_decomp_partition")
ENGINES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fsdp": ("fsdp", {}, {}),
    "fsdp, tp": ("fsdp", {}, {"tp": 2, "sequence_parallel": True}),
    "ddp": ("ddp", {}, {}),
    "ddp, tp": ("ddp", {}, {"tp": 2}),
    **{f"zero{stage}": ("deepspeed", {"zero_stage": stage}, {}) for stage in range(4)},
}
NO_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"


class Talk(TorchDispatchMode):
    """Counts what is said in a forward and its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        if name.startswith("_c10d_functional::") and not name.endswith("wait_tensor"):
            self.calls[name.rpartition(":")[2]] += 1
        return operator(*args, **(kwargs or {}))


def _split(mode: str, sequence_parallel: bool, compiled: bool) -> tuple[dict[str, Tensor], Counter]:
    """Gradients of this rank in fp64, and its collectives, unless the blocks are compiled."""
    model = model_of(Case(model=MODEL)).double()
    split_tensors(model, mesh_of(tp=2), sequence_parallel=sequence_parallel)
    checkpoint_activations(model, mode, compute=torch.float64)
    if compiled:
        with patch.object(torch, "compile", CHEAP):
            compile_blocks(model)
    # Exact dropout: plain draws would differ between a graph and its operators.
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(5)
        talk = Talk()
        with nullcontext() if compiled else talk:
            model(rows_of(0)).loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    return {name: p.grad for name, p in model.named_parameters()}, talk.calls


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])
def test_kept_collectives_are_not_repeated(ranks, sequence_parallel):
    wanted, once = ranks(2)(_split, "none", sequence_parallel, False)[0]
    found, calls = ranks(2)(_split, "selective", sequence_parallel, False)[0]
    assert calls == once
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    found, calls = ranks(2)(_split, "full", sequence_parallel, False)[0]
    assert calls.total() > once.total()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.filterwarnings(NO_LEAF)
@pytest.mark.parametrize(
    ("mode", "sequence_parallel"),
    [
        ("selective", True),
        pytest.param("none", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
        pytest.param("budget:0.6", False, marks=pytest.mark.slow),
    ],
)
def test_split_blocks_are_one_graph(ranks, mode, sequence_parallel):
    """A break in the graph would be an error."""
    uncompiled = ranks(2)(_split, "none", sequence_parallel, False)
    compiled = ranks(2)(_split, mode, sequence_parallel, True, deadline_s=400)
    for (wanted, _), (found, _) in zip(uncompiled, compiled, strict=True):
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-11)


def _steps(case: Case) -> dict[str, float]:
    with patch.object(torch, "compile", CHEAP):
        engine = engine_of(case)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(5)
    try:
        results = [plain(engine.step(micro_batches(case, n), lr=LR)) for n in range(2)]
        evaluated = engine.evaluate(rows_of(0)).loss.item()
    finally:
        torch.use_deterministic_algorithms(False)
    return {"evaluated": evaluated, "first": results[0]["norm"], **results[1]}


@pytest.mark.slow
@pytest.mark.filterwarnings(NO_LEAF)
@pytest.mark.parametrize(
    ("engine", "mode"),
    list(zip([name for name in ENGINES if name != "zero3"], cycle(["every:2", "selective"]))),
)
def test_compiled_engines_give_the_same(ranks, engine, mode):
    """In bf16, where weights change place and type around each forward."""
    kind, settings, parallel = ENGINES[engine]
    case = Case(kind, "bf16", 2, model=MODEL, engine=settings, parallel=parallel)
    settings = {**settings, "activation_checkpointing": mode, "compile": True}
    (wanted, *_), (found, *others) = (
        ranks(2)(_steps, each, deadline_s=400) for each in (case, replace(case, engine=settings))
    )
    assert found == pytest.approx(wanted, rel=2e-2)
    assert others == [found]


def _plain_steps(case: Case) -> list[dict[str, float]]:
    torch.manual_seed(dist.get_rank())
    engine = engine_of(case)
    return [plain(engine.step(micro_batches(case, n), lr=LR)) for n in range(3)]


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("engine", ["fsdp, tp", "zero3"])
def test_recomputed_engines_give_the_same_bits(ranks, engine, mode):
    """Where blocks talk inside: over tp, or to gather weights, in another order the second time."""
    kind, settings, parallel = ENGINES[engine]
    case = Case(kind, "bf16", 2, model=MODEL, engine=settings, parallel=parallel)
    settings = {**settings, "activation_checkpointing": mode}
    wanted, found = (
        ranks(2)(_plain_steps, each) for each in (case, replace(case, engine=settings))
    )
    assert found == wanted
