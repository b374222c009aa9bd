"""Three optimizer steps of a case: by a loop written by hand in one process, and by the product's engine on ranks."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from lmscale.engine.build import build_engine
from tests.gradients.case import EPS, LR, STEPS, GradientCase, micro_batches, model_of, rows_of
from tests.support.engine_case import mesh_of, pieces, plain

BETAS = (0.9, 0.95)
WIDE = {"fp64": torch.float64}
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
# fp16 has no room for small gradients: one process scales by hand what an engine scales by its loss scale.
SCALE = {"fp16": 2.0**12}


@dataclass(frozen=True)
class Outcome:
    """What three steps came to; tensors whole, whoever held them."""

    results: list[dict[str, float]]  # loss, weight, norm, applied of each step
    # The first step's gradient after clipping, by parameter: of Adam's first moment, as every engine has one.
    gradients: dict[str, Tensor] = field(default_factory=dict, repr=False)
    parameters: dict[str, Tensor] = field(default_factory=dict, repr=False)  # after the last step
    spread: dict[str, float] = field(
        default_factory=dict
    )  # of tensors whose copies on several ranks differ


def one_process(case: GradientCase) -> Outcome:
    """Whole batches, the unsplit model, torch's AdamW. Low precision: such copies of the weights, and fp32 masters."""
    # Cases that differ in what must not matter share one answer.
    alike = replace(
        case,
        engine="ddp", tp="8" if case.tp == "8" else "1", sequence_parallel="off", recompute="none",
        offload="none", compile="off", reshard="on", accumulation="1", world="smallest",
    )  # fmt: skip
    return _one_process(alike)


@cache
def _one_process(case: GradientCase) -> Outcome:
    masters = model_of(case).to(WIDE.get(case.precision, torch.float32))
    computing = (
        copy.deepcopy(masters).to(NARROW[case.precision]) if case.precision in NARROW else masters
    )
    named, scale = dict(masters.named_parameters()), SCALE.get(case.precision, 1.0)
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=LR, betas=BETAS, eps=EPS
    )
    outcome = Outcome([])
    for step in range(STEPS):
        with _dropout(case, step):
            sums = computing(rows_of(case, step))
            (sums.loss * (scale / sums.weight)).backward()
        if computing is not masters:
            for low, high in zip(computing.parameters(), named.values(), strict=True):
                high.grad, low.grad = low.grad.to(high.dtype) / scale, None
        norm = torch.stack([p.grad.double().square().sum() for p in named.values()]).sum().sqrt()
        if case.largest_norm is not None:
            factor = (case.largest_norm / (norm + 1e-6)).clamp(max=1.0)  # the 1e-6 is torch's
            torch._foreach_mul_([p.grad for p in named.values()], factor)
        if not step:
            outcome.gradients.update({name: p.grad.clone() for name, p in named.items()})
        adam.step()
        adam.zero_grad()
        computing.load_state_dict(masters.state_dict())
        loss = (sums.loss / sums.weight).item()
        outcome.results.append(
            {"loss": loss, "weight": sums.weight.item(), "norm": norm.item(), "applied": 1.0}
        )
    outcome.parameters.update({name: p.detach().clone() for name, p in named.items()})
    return outcome


def on_ranks(case: GradientCase, device_type: str = "cpu") -> Outcome:
    """Runs on every rank; tensors come from rank 0 only, and lie on the CPU."""
    replicate = 2 if case.engine == "hsdp" else 1
    mesh = mesh_of(dp_replicate=replicate, tp=int(case.tp), device_type=device_type)
    engine = build_engine(case.config(), model_of(case), mesh, torch.device(device_type))
    outcome = Outcome([])
    for step in range(STEPS):
        batches = [
            batch.map(lambda array: array.to(device_type))
            for batch in micro_batches(case, step, mesh.dp_rank)
        ]
        assert len(batches) == int(case.accumulation)
        with _dropout(case, step):
            outcome.results.append(plain(engine.step(batches, lr=LR)))
        if not step:
            moments = _whole(engine.state(), "optim.exp_avg.", outcome)
            outcome.gradients.update({n: value / (1 - BETAS[0]) for n, value in moments.items()})
    outcome.parameters.update(_whole(engine.state(), "model.", outcome))
    del engine
    gc.collect()
    if case.compile == "on":
        torch.compiler.reset()
    return outcome if dist.get_rank() == 0 else Outcome(outcome.results)


def _whole(state: dict[str, Tensor], prefix: str, outcome: Outcome) -> dict[str, Tensor]:
    """All tensors of a kind, put together from the parts of all ranks; notes copies that differ. Collective."""
    views = {name: value for name, value in state.items() if name.startswith(prefix)}
    highest, lowest = (
        {n: torch.full(v.shape, bound, dtype=v.dtype) for n, v in views.items()}
        for bound in (-torch.inf, torch.inf)
    )
    for name, value in views.items():
        for where, part in pieces(value):
            highest[name][where] = lowest[name][where] = part
    flat = torch.cat(
        [*(v.flatten() for v in highest.values()), *(-v.flatten() for v in lowest.values())]
    )
    dist.all_reduce(flat, dist.ReduceOp.MAX)
    high, low = flat.chunk(2)
    sizes = [value.numel() for value in highest.values()]
    found = {}
    for name, a, b in zip(views, high.split(sizes), (-low).split(sizes), strict=True):
        if not torch.equal(a, b):
            outcome.spread[name] = (a - b).abs().max().item()
        found[name.removeprefix(prefix)] = a.view(views[name].shape).clone()
    return found


@contextmanager
def _dropout(case: GradientCase, step: int) -> Iterator[None]:
    """Seed the masks. Under deterministic algorithms they are a function of seed and place, whoever computes."""
    torch.manual_seed(77 + step)
    torch.use_deterministic_algorithms(case.dropout == "on")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
