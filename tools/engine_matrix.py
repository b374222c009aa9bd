"""One optimizer step of every engine and option against one plain process, on batches that the product's loader reads.

Two resident ranks (tests/dist/pool.py) against a loop written by hand in this process: the same ten rows a step,
which are five a rank, in one micro-batch or in three of two rows, the last of them short.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "dist"))

import torch
import torch.distributed as dist
from engine_case import gathered, mesh_of, plain
from judge import relative
from torch import Tensor

from lmscale.batch import Batch
from lmscale.config.run import RunConfig
from lmscale.config.sections import EngineConfig, ModelConfig, OptimConfig
from lmscale.corpus.manifest import resolve
from lmscale.corpus.order import Order
from lmscale.corpus.reader import Reader
from lmscale.data.loader import Loader, Share
from lmscale.engine.build import build_engine
from lmscale.model.build import build_model
from lmscale.model.language import LanguageModel
from lmscale.optim.build import parameter_groups

RANKS, ROWS, LENGTH, STEPS, LR = 2, 10, 32, 3, 1e-2
MICRO_BATCH = {1: 5, 3: 2}  # by accumulation
MODEL = {"layers": 2, "width": 32, "heads": 2, "feed_forward": 64, "init_std": 0.2}
# eps: where a gradient vanishes, Adam must not turn rounding into full-size steps.
# clip: far below this model's norms, so that clipping is always at work.
OPTIM = OptimConfig(lr=LR, eps=1e-3, clip=0.05, weight_decay=0.1)

Errors = dict[str, float]


@dataclass(frozen=True)
class Crossing:
    """One cell of the matrix."""

    kind: str
    precision: str
    activation_checkpointing: str
    documents: str
    accumulation: int

    @property
    def name(self) -> str:
        return "/".join(str(value) for value in asdict(self).values())


def crossings() -> list[Crossing]:
    options = product(("none", "full", "every:2"), ("separate", "joined"), (1, 3))
    engines = product(("fsdp", "ddp", "deepspeed"), ("fp32", "bf16", "fp64"))
    supported = [pair for pair in engines if pair != ("deepspeed", "fp64")]
    return [Crossing(*pair, *rest) for pair, rest in product(supported, list(options))]


def errors_of(ranks: Any, cell: Crossing, corpus: Path) -> tuple[Errors, list[str]]:
    """Largest differences from one process, and what must be exact and is not."""
    answers = ranks(on_ranks, cell, str(corpus))
    results, states = answers[0]
    wanted, wanted_states = one_process(cell, corpus)
    problems = [
        f"rank {rank} found other results" for rank, a in enumerate(answers) if a[0] != results
    ]
    problems += [
        f"step {step}: {key} is {left[key]}, one process {right[key]}"
        for step, (left, right) in enumerate(zip(results, wanted, strict=True), start=1)
        for key in ("weight", "applied")
        if left[key] != right[key]
    ]
    first, last = states[0], states[-1]
    errors = {
        "loss": max(relative(a["loss"], b["loss"]) for a, b in zip(results, wanted, strict=True)),
        "norm": max(relative(a["norm"], b["norm"]) for a, b in zip(results, wanted, strict=True)),
        # exp_avg after the first step is the clipped gradient times 1 - beta1: every gradient is seen
        "gradient": worst_tensor(first, wanted_states[0], "optim.exp_avg."),
        "weights": worst_tensor(last, wanted_states[-1], "model."),
    }
    return errors, problems


def worst_tensor(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str) -> float:
    """Largest difference of an element, relative to its tensor's largest element."""
    names = {name for name in wanted if name.startswith(prefix)}
    if not names or names != {name for name in found if name.startswith(prefix)}:
        return float("inf")
    return max(
        ((found[name].double() - wanted[name].double()).abs().max()
        / wanted[name].double().abs().max().clamp(min=1e-30)).nan_to_num(nan=torch.inf).item()
        for name in names
    )  # fmt: skip


def steps_of(
    cell: Crossing, corpus: Path, *, rank: int, size: int, micro_batch: int
) -> Iterator[list[Batch[Tensor]]]:
    """The micro-batches of this rank, as the trainer's loader makes them."""
    with Reader(resolve(corpus, "train"), seq_len=LENGTH, memory_bytes=1 << 24) as reader:
        order = Order(reader.num_samples, reader.samples_per_chunk, ROWS)
        share = Share(ROWS, micro_batch, rank, size)
        loader = Loader(reader, order, share, documents=cell.documents, prefetch=0)  # type: ignore[arg-type]
        for step in range(STEPS):
            batches = loader.step_at(step * ROWS).micro_batches
            yield [batch.map(torch.from_numpy) for batch in batches]


def model_of(corpus: Path, dtype: torch.dtype) -> LanguageModel:
    with Reader(resolve(corpus, "train"), seq_len=LENGTH, memory_bytes=1 << 20) as reader:
        vocab_size = reader.manifest.tokenizer.vocab_size
    config = ModelConfig(**MODEL)
    return build_model(config, vocab_size=vocab_size, max_positions=LENGTH).to(dtype)


def on_ranks(cell: Crossing, corpus: str) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """Runs on every rank: results of each step, and the state after it."""
    config = RunConfig.model_construct(
        model=ModelConfig(**MODEL),
        engine=EngineConfig(
            kind=cell.kind,
            precision=cell.precision,
            activation_checkpointing=cell.activation_checkpointing,
        ),
        optim=OPTIM,
    )
    model = model_of(Path(corpus), torch.float32)  # fp64 is the engine's to make
    engine = build_engine(config, model, mesh_of(), torch.device("cpu"))
    rank, size = dist.get_rank(), dist.get_world_size()
    results, states = [], []
    micro_batch = MICRO_BATCH[cell.accumulation]
    for batches in steps_of(cell, Path(corpus), rank=rank, size=size, micro_batch=micro_batch):
        assert len(batches) == cell.accumulation
        results.append(plain(engine.step(batches, lr=LR)))
        states.append(gathered(engine.state()))
    return results, states


def one_process(
    cell: Crossing, corpus: Path
) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """The same steps by a plain loop on whole batches. bf16: bf16 weights and fp32 masters."""
    masters = model_of(corpus, torch.float64 if cell.precision == "fp64" else torch.float32)
    computing = copy.deepcopy(masters).bfloat16() if cell.precision == "bf16" else masters
    named = list(masters.named_parameters())
    adam = torch.optim.AdamW(
        parameter_groups(iter(named), OPTIM.weight_decay), lr=LR, betas=OPTIM.betas, eps=OPTIM.eps
    )
    results, states = [], []
    for (batch,) in steps_of(cell, corpus, rank=0, size=1, micro_batch=ROWS):
        sums = computing(batch)
        loss = sums.loss / sums.weight
        loss.backward()
        _hand_over(list(computing.parameters()), [parameter for _, parameter in named])
        gradients = [parameter.grad for _, parameter in named if parameter.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt().item()
        torch.nn.utils.clip_grad_norm_(masters.parameters(), OPTIM.clip or 0.0)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            for low, high in zip(computing.parameters(), masters.parameters(), strict=True):
                low.copy_(high)
        state = {f"model.{name}": parameter.detach().clone() for name, parameter in named}
        for name, parameter in named:
            state[f"optim.exp_avg.{name}"] = adam.state[parameter]["exp_avg"].clone()
        results.append(
            {"loss": loss.item(), "weight": sums.weight.item(), "norm": norm, "applied": 1.0}
        )
        states.append(state)
    return results, states


def _hand_over(computing: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    for low, high in zip(computing, masters, strict=True):
        if low is not high and low.grad is not None:
            high.grad, low.grad = low.grad.to(high.dtype), None
