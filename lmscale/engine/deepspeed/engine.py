"""DeepSpeed's ZeRO, stages 0 to 3.

DeepSpeed reduces, partitions and gathers; counting, norm, clipping, the loss scale and the decision to skip
a step are ours, as for the other engines. Only the files zero*.py know DeepSpeed; each names at its head what
it reads that is private. Pinned, because no release promises any of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmscale.base.batch import Batch, Sums
from lmscale.config.schema import EngineConfig, OptimConfig
from lmscale.distributed.mesh import Mesh
from lmscale.engine import step as account
from lmscale.engine import step as adam
from lmscale.engine.base import StepResult, Weight
from lmscale.engine.deepspeed.setup import start_deepspeed
from lmscale.engine.deepspeed.stages import (
    Bf16Stage12Ranges,
    Stage0Ranges,
    Stage3Ranges,
    Stage12Ranges,
    ZeroRanges,
)
from lmscale.engine.layout import TpLayout, part_of
from lmscale.engine.step import LossScale
from lmscale.optim.optimizer import build_adamw, parameter_groups
from lmscale.parallel.low_precision import LowPrecision

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DeepSpeedEngine:
    """See Engine. bf16, fp16: weights and backward are low; reduction, accumulation, masters, moments fp32."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        engine: EngineConfig,
        optim: OptimConfig,
        layout: TpLayout | None = None,
        layer_stats: bool = False,
    ) -> None:
        # DeepSpeed would turn them to bf16 with the weights, and positions would lose their precision.
        assert not any(buffer.is_floating_point() for buffer in model.buffers())
        self._model = model
        self._mesh = mesh
        self._layout = layout or TpLayout(mesh, sequence_parallel=False)
        self._clip = optim.max_grad_norm
        low = _LOW.get(engine.precision)
        self._lowered: Callable[[], Any] = nullcontext
        if low is not None and engine.zero_stage == 0:
            self._lowered = LowPrecision(model, low)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = parameter_groups(iter(named), optim.weight_decay)
        self._adam = build_adamw(groups, optim, fused=True)
        exact = None
        if low is not None and engine.zero_stage:
            # DeepSpeed takes its fp32 masters from weights that it has just rounded.
            exact = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._wrapper = start_deepspeed(model, self._adam, mesh, engine)
        self._parts = _parts_of(self._wrapper, model, mesh, engine, exact)
        with self._parts.listed():
            adam.materialise(self._adam)
        self._scale = LossScale(self._wrapper.device) if engine.precision == "fp16" else None
        self._counted = self._count_together(layer_stats)
        self.parts = tuple(self._counted) if layer_stats else ()

    def step(self, micro_batches: Sequence[Batch[Tensor]], *, lr: float) -> StepResult:
        """One optimizer step; see Engine."""
        weight = account.count_targets(micro_batches, self._mesh)
        scale = self._mesh.dp_size / weight  # DeepSpeed averages over dp
        if self._scale is not None:
            scale = scale * self._scale.scale
        losses = []
        for index, batch in enumerate(micro_batches):
            self._wrapper.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            with self._lowered():
                sums: Sums[Tensor] = self._wrapper(batch)
                scaled = sums.loss * scale.to(sums.loss.dtype)
                self._wrapper.backward(scaled, scale_wrt_gas=False)
            losses.append(sums.loss.detach())
        self._parts.reduce()
        with torch.no_grad():
            return self._update(losses, weight, lr=lr)

    def evaluate(self, batch: Batch[Tensor]) -> Sums[Tensor]:
        """This rank's sums; see Engine."""
        return cast(Sums[Tensor], self._look(self._model, batch))

    def logits(self, batch: Batch[Tensor]) -> Tensor:
        """[B, L, V] of this rank's batch; see Engine."""
        return cast(Tensor, self._look(cast(Any, self._model).logits, batch))

    def state(self, loading: bool = False) -> dict[str, Tensor]:
        """Live views under neutral names; see Engine."""
        del loading  # what is gathered is gathered anew in `loaded`
        found = {}
        for part in (*self._parts.trainable, *self._parts.frozen):
            found[f"model.{part.name}"] = self._layout.fragment(
                part.name, part.of(part.flat), start=part.start, shape=part.shape
            )
        for part in self._parts.trainable:
            moments = self._adam.state[part.flat]
            for key in adam.MOMENTS:
                found[f"optim.{key}.{part.name}"] = self._layout.fragment(
                    part.name, part.of(moments[key]), start=part.start, shape=part.shape
                )
        return found

    def weights(self) -> Iterator[Weight]:
        """What this rank computes with, gathered or not; see Engine."""
        for name, parameter in self._model.named_parameters():
            held, _ = self._parts.held(parameter)
            yield Weight(name, self._layout.piece(name, self._parts.cut), held)

    def loaded(self, *, optim_step: int, loss_scale: float | None = None) -> None:
        """Finish a load; see Engine."""
        with self._parts.listed(), torch.no_grad():
            adam.set_count(self._adam, optim_step)
        with torch.no_grad():
            self._parts.refresh()
        if self._scale is not None and loss_scale is not None:
            self._scale.resume(loss_scale)

    @property
    def optim_step(self) -> int:
        """Updates applied so far."""
        with self._parts.listed():
            return adam.count(self._adam)

    @property
    def loss_scale(self) -> float | None:
        """See Engine."""
        return None if self._scale is None else self._scale.scale.item()

    def _update(self, losses: list[Tensor], weight: Tensor, *, lr: float) -> StepResult:
        gradients = self._parts.gradients()
        if self._scale is not None:
            self._scale.unscale(gradients)
        named = zip(self._parts.trainable, gradients, strict=True)
        account.sum_partial([g for part, g in named if self._layout.partial(part.name)], self._mesh)
        squares = self._squares(gradients).to(weight.device)
        result = account.close(losses, weight, squares, self._mesh)
        # With offload the gradients are on another device than the losses: only then this waits.
        at_home = replace(result, grad_norm=result.grad_norm.to(self._parts.home))
        account.clip(gradients, at_home, self._clip)
        with self._parts.listed():
            adam.prepare(self._adam, lr=lr, applied=result.applied)
        self._parts.update()
        if self._scale is not None:
            self._scale.update(result.applied)
        return result

    def _squares(self, gradients: Sequence[Tensor]) -> Tensor:
        """This rank's share of the squared norm: of each part with log.layer_stats, else of all."""
        found = [
            torch.stack(
                [
                    account.sum_of_squares([gradients[i] for i in places], self._parts.home)
                    / copies
                    for copies, places in counted.items()
                ]
            ).sum()
            for counted in self._counted.values()
        ]
        return torch.stack(found) if self.parts else found[0]

    def _count_together(self, layer_stats: bool) -> dict[str, dict[int, list[int]]]:
        """Places of gradients, by part of the model (one without layer_stats) and ranks that hold the same."""
        found: dict[str, dict[int, list[int]]] = {}
        for place, part in enumerate(self._parts.trainable):
            of = part_of(part.name) if layer_stats else ""
            copies = self._parts.gradient_copies * self._layout.tp_copies(part.name)
            found.setdefault(of, {}).setdefault(copies, []).append(place)
        return found

    def _look(self, method: Callable[..., Any], batch: Batch[Tensor]) -> Any:
        self._model.eval()
        try:
            with torch.no_grad(), self._lowered():
                return method(batch)
        finally:
            self._model.train()
            self._parts.let_go()


def _parts_of(
    wrapper: Any,
    model: nn.Module,
    mesh: Mesh,
    engine: EngineConfig,
    exact: dict[str, Tensor] | None,
) -> ZeroRanges:
    match engine.zero_stage:
        case 0:
            return Stage0Ranges(wrapper, model, mesh)
        case 3:
            return Stage3Ranges(wrapper, model, mesh, exact)
        case 1 if engine.precision == "bf16" and engine.offload == "none":
            return Bf16Stage12Ranges(wrapper, model, mesh, exact)
        case _:
            return Stage12Ranges(wrapper, model, mesh, exact)
