"""What `lmscale plan` says of a rank's memory, against real engines of one, two and four ranks."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmscale.base.batch import Batch, Stream
from lmscale.config.model_spec import decoder_spec
from lmscale.engine import base
from lmscale.engine.build import build_engine
from lmscale.modelspec.activations import MicroBatch, activation_bytes, block_bytes, recompute_modes
from lmscale.modelspec.parameters import parameters
from lmscale.modelspec.spec import ModelSpec
from lmscale.parallel.passes import parallelize
from lmscale_launcher.planner.memory_estimate import Memory, MeshSizes, held_by, memory_of
from tests.support.engine_case import VOCAB, Case, mesh_for, model_of
from tests.support.rank_pool import Pool

ROWS, LENGTH = 4, 192
# Activations and weights of about the same size, so that neither hides the other's mistake.
MODEL = {
    "num_layers": 6,
    "hidden_size": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 250,
}


def batch() -> Batch[Tensor]:
    tokens_BL = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % VOCAB
    stream = Stream(tokens_BL, torch.arange(LENGTH).repeat(ROWS, 1), None)
    return Batch(stream, None, tokens_BL, torch.ones(ROWS, LENGTH), torch.arange(ROWS))


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Each storage once."""
    found = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def held(case: Case) -> dict[str, int]:
    """Bytes of a real engine when the update is made: weights, gradients, optimizer state."""
    engine: Any = build_engine(case.config(), model_of(case), mesh_for(case), torch.device("cpu"))
    read = of_zero if case.kind == "deepspeed" else of_torch
    seen: dict[str, int] = {}
    reduce_result = base.reduce_result

    def measure(*args: Any) -> Any:
        seen.update({part: storage_bytes(tensors) for part, tensors in read(engine).items()})
        return reduce_result(*args)

    with patch.object(base, "reduce_result", measure):
        engine.step([batch()], lr=1e-3)
    return seen


def moments_of(engine: Any) -> list[Tensor]:
    states = engine._optimizer.state.values()
    return [value for state in states for value in state.values() if torch.is_tensor(value)]


def of_torch(engine: Any) -> dict[str, list[Tensor]]:
    return {
        "parameters": list(engine._model.parameters()),
        "optimizer": moments_of(engine),
        "gradients": [t.local.grad for t in engine._parameters if t.local.grad is not None],
    }


def of_zero(engine: Any) -> dict[str, list[Tensor]]:
    parameters = list(engine._model.parameters())
    parts, stage = engine._stage, engine._wrapper.zero_optimization_stage()
    masters = [part.flat for part in parts.trainable if part.size] if stage else []
    gradients = [g for g in parts.gradients() if g.numel()]
    whole = [p.grad_accum for p in parameters if getattr(p, "grad_accum", None) is not None]
    return {
        "parameters": [getattr(p, "ds_tensor", p) for p in parameters],
        "optimizer": moments_of(engine) + masters,
        "gradients": whole or gradients,
    }


def peak(case: Case, accumulation: int) -> tuple[int, int]:
    """The CPU allocator's peak over a step, and what stood there before: both in bytes."""
    before = everything()
    engine = build_engine(case.config(), model_of(case), mesh_for(case), torch.device("cpu"))
    steps = [batch() for _ in range(accumulation)]
    engine.step(steps, lr=1e-3)  # buckets and buffers of the first step
    stands = everything() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        engine.step(steps, lr=1e-3)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda event: event.start_ns()))
    return stands + max(accumulate(changes)), stands


def everything() -> int:
    """Bytes of all tensors of this process. What torch.compile keeps of earlier cases as fake tensors has no bytes."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if isinstance(o, Tensor))
    return storage_bytes(tensor for tensor in tensors if not _is_fake(tensor))


def _is_fake(tensor: Tensor) -> bool:
    local = getattr(tensor, "_local_tensor", tensor)
    return isinstance(local, FakeTensor | FunctionalTensor)


def planned_mesh(case: Case, size: int) -> MeshSizes:
    parallel = case.config().parallel
    dp = size // parallel.tp
    if case.kind == "ddp":
        return MeshSizes(dp, 1, parallel.tp)
    return MeshSizes(parallel.dp_replicate, dp // parallel.dp_replicate, parallel.tp)


def spec_of(case: Case) -> ModelSpec:
    return decoder_spec(case.config().model, vocab_size=VOCAB, max_positions=LENGTH)


def micro_batch_of(case: Case) -> MicroBatch:
    cfg = case.config()
    return MicroBatch(
        device="cpu", precision=case.precision, rows=ROWS, seq_len=LENGTH,
        separate=False, recompute=cfg.engine.activation_checkpointing, tp=cfg.parallel.tp,
        sequence_parallel=cfg.parallel.sequence_parallel,
    )  # fmt: skip


def planned(case: Case, size: int, accumulation: int = 1) -> Memory:
    cfg = case.config()
    mesh = planned_mesh(case, size)
    return memory_of(
        spec_of(case), cfg.engine, mesh, batch=micro_batch_of(case), micro_batches=accumulation
    )


def zero(stage: int, **rest: Any) -> Case:
    return Case(kind="deepspeed", engine={"zero_stage": stage}, **rest)


CASES = {
    "fsdp": Case(kind="fsdp"),
    "fsdp-bf16": Case(kind="fsdp", precision="bf16"),
    "fsdp-fp64": Case(kind="fsdp", precision="fp64"),
    "hsdp": Case(kind="fsdp", parallel={"dp_replicate": 2}),
    "ddp": Case(kind="ddp"),
    "ddp-bf16": Case(kind="ddp", precision="bf16"),
    "zero0": zero(0),
    "zero0-bf16": zero(0, precision="bf16"),
    "zero1": zero(1),
    "zero1-bf16": zero(1, precision="bf16"),
    "zero2": zero(2),
    "zero2-bf16": zero(2, precision="bf16"),
    "zero3": zero(3),
    "zero3-bf16": zero(3, precision="bf16"),
    "gpt2": Case(
        model={
            "norm": "layer",
            "bias": True,
            "tie_embeddings": True,
            "positions": "learned",
            "max_positions": LENGTH,
        }
    ),
    "frozen": Case(model={"trainable": ("*.attention.*", "decoder.norm.*")}),
    "fsdp-tp": Case(kind="fsdp", parallel={"tp": 2}),
    "zero2-tp": zero(2, parallel={"tp": 2}),
}
# On two ranks and more tensors are split; on one, padding and copies are visible: a case of each kind.
SIZES = {
    "hsdp": (4,), "fsdp-tp": (4,),
    **{name: (1, 2) for name in ("fsdp", "ddp-bf16", "zero1", "zero1-bf16", "zero2-bf16", "zero3")},
}  # fmt: skip


def with_size(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, s, id=f"{n}-{s}") for n in names for s in SIZES.get(n, (2,))]


@pytest.mark.parametrize(("name", "size"), with_size(CASES))
def test_weights_gradients_and_optimizer_state_are_exact(
    ranks: Callable[..., Pool], name: str, size: int
) -> None:
    case = CASES[name]
    # Odd: rows cannot be dealt evenly.
    hidden = 56 if case.config().parallel.tp > 1 else 55
    case = replace(case, model={**case.model, "ffn_hidden_size": hidden})
    real = ranks(size)(held, case)[0]
    cfg = case.config()
    mesh = planned_mesh(case, size)
    plan = held_by(spec_of(case), cfg.engine, mesh, micro_batches=1)
    assert (plan.parameters, plan.optimizer) == (real["parameters"], real["optimizer"])
    if name in ("zero1", "zero2", "zero2-tp"):
        # A second, flat copy comes after this look, and a gradient that straddles two ranks is held whole.
        straddling = real["gradients"] - plan.gradients // 2
        assert 0 <= straddling <= 4 * max(p.size for p in parameters(spec_of(case)))
    elif name.startswith("zero3"):  # likewise a copy for the update
        assert plan.gradients == 2 * real["gradients"]
    else:
        assert plan.gradients == real["gradients"]


PEAKS = ["fsdp", "fsdp-bf16", "ddp", "ddp-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16"]


@pytest.mark.parametrize(
    ("name", "size", "accumulation"),
    [("fsdp", 1, 1), ("zero2-bf16", 1, 1), *((name, 2, 3) for name in PEAKS)],
)
def test_the_sum_is_a_little_above_the_peak(
    ranks: Callable[..., Pool], name: str, accumulation: int, size: int
) -> None:
    case = replace(CASES[name], model=MODEL)
    real, _ = ranks(size)(peak, case, accumulation)[0]
    plan = planned(case, size, accumulation).total
    # A collective's thread lets go of its buffers late, and not always as late: 0.94 to 1.00 of the same case.
    assert 0.9 * real <= plan <= 1.25 * real, plan / real


class Alive(TorchDispatchMode):
    """Remembers the memory that operators have made. The profiler misses what a collective's thread frees."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)
        }
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._made.append((StorageWeakRef(storage), storage.nbytes()))
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self._made if not storage.expired())


def kept(case: Case) -> int:
    """Bytes that a forward on this rank leaves for its backward, without the result."""
    model, cfg = model_of(case), case.config()
    parallelize(model, mesh_for(case), engine=cfg.engine, parallel=cfg.parallel)
    with Alive() as alive:
        hidden = model.decoder(batch().inputs)
    return alive.bytes() - hidden.untyped_storage().nbytes()


@pytest.mark.parametrize("split", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_of_tensor_parallel_ranks(
    ranks: Callable[..., Pool], recompute: str, split: bool
) -> None:
    case = Case(
        kind="ddp",
        model=MODEL,
        engine={"activation_checkpointing": recompute},
        parallel={"tp": 2, "sequence_parallel": split},
    )
    real = ranks(2)(kept, case)[0]
    spec, batch = spec_of(case), micro_batch_of(case)
    stack = spec.stack("decoder")
    once = activation_bytes(spec, replace(batch, recompute="none"))
    once -= batch.tokens * stack.num_layers * block_bytes(stack, batch, "none")
    blocks = sum(
        count * block_bytes(stack, batch, mode)
        for mode, count in recompute_modes(stack, batch).items()
    )
    assert batch.tokens * blocks + once == pytest.approx(real, rel=0.03)
