"""A tiny model, uneven batches, one plain process to compare with, and any engine over any ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from lmscale.base.batch import Batch, Stream
from lmscale.base.world import World
from lmscale.config.schema import (
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from lmscale.distributed.mesh import Mesh, make_mesh
from lmscale.engine.base import Engine
from lmscale.engine.build import build_engine
from lmscale.engine.step import StepResult
from lmscale.model.build import build_model
from lmscale.model.transformer import LanguageModel
from lmscale.optim.optimizer import parameter_groups

VOCAB, LENGTH, ROWS = 61, 12, 12
FILLERS = 3  # the last rows of every step: the last rank has a micro-batch without any target
LR = 1e-2
# Differences from one process, as measured: fp64 1e-15, fp32 1e-7 at the first step and 2e-6 after
# Adam has divided small gradients by small roots.
TOLERANCE = {"fp32": 5e-6, "fp64": 1e-10}


@dataclass(frozen=True)
class Case:
    """What a test varies. The rows of a step are the same for any ranks and micro-batches."""

    kind: str = "fsdp"
    precision: str = "fp32"
    accumulation: int = 1
    clip: float | None = 0.05  # far below this model's norms: clipping is always at work
    seed: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    layer_stats: bool = False

    def config(self) -> RunConfig:
        sizes = {
            "num_layers": 3,
            "hidden_size": 40,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 56,
        }
        return RunConfig.model_construct(
            model=ModelConfig(**{**sizes, "init_std": 0.2, **self.model}),
            engine=EngineConfig(kind=self.kind, precision=self.precision, **self.engine),
            # eps: where a gradient vanishes, Adam must not turn rounding into full-size steps
            optim=OptimConfig(lr=LR, eps=1e-3, max_grad_norm=self.clip, weight_decay=0.1),
            parallel=ParallelConfig(**self.parallel),
            log=LogConfig(layer_stats=self.layer_stats),
        )


def model_of(case: Case) -> LanguageModel:
    return build_model(case.config().model, vocab_size=VOCAB, max_positions=LENGTH, seed=case.seed)


@cache
def mesh_of(*, dp_replicate: int = 1, tp: int = 1, device_type: str = "cpu") -> Mesh:
    """Collective; the groups stay for the pool's life."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sizes = ParallelConfig(dp_replicate=dp_replicate, tp=tp)
    return make_mesh(sizes, World(rank, rank, size, size), device_type)


def mesh_for(case: Case) -> Mesh:
    sizes = case.config().parallel
    return mesh_of(dp_replicate=sizes.dp_replicate, tp=sizes.tp)


def engine_of(case: Case) -> Engine:
    return build_engine(case.config(), model_of(case), mesh_for(case), torch.device("cpu"))


def rows_of(step: int, rows: slice = slice(None)) -> Batch[Tensor]:
    """Some of the rows of a step: two documents a row, targets at some places, fillers at the end."""
    draw = torch.Generator().manual_seed(1000 + step)
    tokens_BL1 = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=draw)
    share_B1 = torch.linspace(0.2, 1, ROWS)[:, None]
    weights_BL = (torch.rand(ROWS, LENGTH, generator=draw) < share_B1).float()
    border_B1 = torch.randint(1, LENGTH, (ROWS, 1), generator=draw)
    place_BL = torch.arange(LENGTH).expand(ROWS, LENGTH)
    documents_BL = (place_BL >= border_B1).long()
    positions_BL = place_BL - border_B1 * documents_BL
    rows_B = torch.arange(ROWS)
    weights_BL[-FILLERS:], documents_BL[-FILLERS:], rows_B[-FILLERS:] = 0, -1, -1
    stream = Stream(tokens_BL1[:, :-1], positions_BL, documents_BL)
    batch = Batch(stream, None, tokens_BL1[:, 1:], weights_BL, rows_B)
    return batch.map(lambda array: array[rows].contiguous())


def micro_batches(case: Case, step: int) -> list[Batch[Tensor]]:
    """This rank's part of the step: the same on the ranks of a tp group."""
    mesh = mesh_for(case)
    size = ROWS // mesh.dp_size // case.accumulation
    first = mesh.dp_rank * size * case.accumulation
    return [
        rows_of(step, slice(start, start + size))
        for start in range(first, first + size * case.accumulation, size)
    ]


def pieces(value: Tensor) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """What this rank holds of a global tensor: (where, live memory), as a checkpoint would see it."""
    if not hasattr(value, "__create_chunk_list__"):
        yield (), value
        return
    for chunk in value.__create_chunk_list__():
        if chunk.sizes.numel():
            where = tuple(
                slice(start, start + size)
                for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            yield where, value.__get_tensor_shard__(MetadataIndex("", chunk.offsets))


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, put together from the parts of all ranks. Copies must be bitwise equal."""
    high, highs = _in_one(state, -torch.inf)
    low, lows = _in_one(state, torch.inf)
    for name, value in state.items():
        for where, part in pieces(value):
            highs[name][where] = lows[name][where] = part
    dist.all_reduce(high, dist.ReduceOp.MAX)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    for name, found in highs.items():
        assert torch.equal(found, lows[name]), f"{name}: copies differ, or nobody has all of it"
    return {name: found.to(state[name].dtype) for name, found in highs.items()}


def _in_one(state: dict[str, Tensor], fill: float) -> tuple[Tensor, dict[str, Tensor]]:
    """A flat tensor with a place for each of these, and those places: for one reduction instead of hundreds."""
    sizes = [value.shape.numel() for value in state.values()]
    flat = torch.full((sum(sizes),), fill, dtype=torch.float64)  # which holds every other type
    places = zip(state.items(), flat.split(sizes), strict=True)
    return flat, {name: place.view(value.shape) for (name, value), place in places}


def load_into(engine: Engine, state: dict[str, Tensor], *, optim_step: int) -> None:
    """As a checkpoint's load: in place, part by part."""
    views = engine.state(loading=True)
    assert views.keys() == state.keys()
    with torch.no_grad():
        for name, view in views.items():
            for where, part in pieces(view):
                part.copy_(state[name][where])
    engine.finish_load(optim_step=optim_step)


def plain(result: StepResult) -> dict[str, float]:
    return {
        "loss": result.loss.item(),
        "weight": result.weight.item(),
        "norm": result.grad_norm.item(),
        "applied": float(result.applied.item()),
    }


def train(case: Case, steps: Sequence[int] = range(3)) -> tuple[list[dict[str, float]], Any]:
    """Results of some steps and the whole state after each."""
    engine = engine_of(case)
    results, states = [], []
    for step in steps:
        results.append(plain(engine.step(micro_batches(case, step), lr=LR)))
        states.append(gathered(engine.state()))
    assert engine.optim_step == len(steps)
    return results, states


def interrupted(first: Case, second: Case, steps: int, more: int) -> Any:
    """Steps of one engine; then its state in another that began elsewhere; then more steps."""
    before = engine_of(first)
    for step in range(steps):
        before.step(micro_batches(first, step), lr=LR)
    kept = gathered(before.state())
    after = engine_of(second)
    after.evaluate(rows_of(0))  # gathers weights that the load must replace
    load_into(after, kept, optim_step=before.optim_step)
    restored = gathered(after.state())
    same = all(torch.equal(kept[name], restored[name]) for name in kept)
    results = [
        plain(after.step(micro_batches(second, step), lr=LR)) for step in range(steps, steps + more)
    ]
    return same, results, gathered(after.state()), after.optim_step


def reference(
    case: Case, dtype: torch.dtype, steps: Sequence[int] = range(3)
) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """The same steps by a plain loop on whole batches in this process."""
    model = model_of(case).to(dtype)
    optim = case.config().optim
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adam = torch.optim.AdamW(
        parameter_groups(iter(named), optim.weight_decay), betas=optim.betas, eps=optim.eps
    )
    results, states = [], []
    for step in steps:
        batch = rows_of(step)
        sums = model(batch)
        (sums.loss / sums.weight).backward()
        gradients = [p.grad for _, p in named if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt().item()
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in named], case.clip)
        for group in adam.param_groups:
            group["lr"] = LR
        adam.step()
        adam.zero_grad()
        loss = (sums.loss / sums.weight).item()
        results.append({"loss": loss, "weight": sums.weight.item(), "norm": norm, "applied": 1.0})
        state = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
        for name, p in named:
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"optim.{key}.{name}"] = adam.state[p][key].clone()
        states.append(state)
    return results, states


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Scalars relative to themselves, tensors relative to their largest element."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("attention.k.bias"):
            continue  # softmax is blind to it: its gradient is nothing but rounding
        wanted = torch.as_tensor(value, dtype=torch.float64)
        scale = wanted.abs().max().clamp(min=1e-30).item()
        error = (torch.as_tensor(found[name], dtype=torch.float64) - wanted).abs().max().item()
        assert error <= tolerance * scale, f"{name}: off by {error / scale:.1e}"
