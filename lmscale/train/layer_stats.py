"""Diagnostics beside metrics.jsonl: norms per part of the model (`log.layer_stats`, layers.jsonl), and
changes of fp16's loss scale (events).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lmscale.distributed.process_group import gather_objects, sum_over
from lmscale.distributed.seeds import mix
from lmscale.engine.base import Engine
from lmscale.engine.layout import block_name
from lmscale.engine.step import StepResult, sum_of_squares
from lmscale.train.run_context import RunContext

Line = dict[str, Any]


class LossScaleRecorder:
    """Watches the engine's scale. Collective."""

    def __init__(self, rank: RunContext, engine: Engine) -> None:
        self._rank = rank
        self._engine = engine
        self._every = rank.cfg.log.every_steps if rank.cfg.engine.precision == "fp16" else None
        self._last: float | None = None

    def after_step(self, step: int) -> None:
        """Check every log.every_steps steps only, because reading the scale waits for the device."""
        if self._every is None or step % self._every:
            return
        scale = self._engine.loss_scale
        if scale != self._last:
            self._rank.write_event("loss_scale", step=step, scale=scale, before=self._last)
            self._last = scale


class LayerStats:
    """Lines of layers.jsonl, written one step late so that the loop never waits for the device.

    {"step", "grad_norm": {part: before clipping}, "weight_norm": {part: after the update}}. Collective: every rank
    calls each method; only rank 0 has callbacks.
    """

    def __init__(
        self, rank: RunContext, engine: Engine, callbacks: Sequence[Callable[[Line], object]]
    ) -> None:
        self._every = rank.cfg.log.every_steps if rank.cfg.log.layer_stats else None
        self._engine = engine
        self._callbacks = callbacks
        self._device = rank.device
        self._pending: tuple[int, Tensor | None, Tensor] | None = None
        if self._every is not None:
            self._parts, self._copies = _parts_and_copies(engine)

    def note(self, *, step: int, result: StepResult) -> None:
        """Note a step's result and, every log.every_steps steps, measure the weights."""
        self.flush()
        if self._every is not None and step % self._every == 0:
            self._pending = (step, result.norms, self._weight_norms())

    def flush(self) -> None:
        """Write the pending line."""
        if self._pending is None:
            return
        (step, gradients, weights), self._pending = self._pending, None
        line = {
            "step": step,
            "grad_norm": {} if gradients is None else _named(self._engine.block_names, gradients),
            "weight_norm": _named(self._parts, weights),
        }
        for callback in self._callbacks:
            callback(line)

    def _weight_norms(self) -> Tensor:
        """One small all-reduce; each element counts once, however many ranks hold a copy of it."""
        squares = dict.fromkeys(
            self._parts, torch.zeros((), dtype=torch.float64, device=self._device)
        )
        for name, piece, tensor in self._engine.weights():
            # Norms of rows are summed in the tensor's own precision: 8 bits would be too few.
            wide = tensor.detach().to(
                self._device, torch.promote_types(tensor.dtype, torch.float32)
            )
            own = sum_of_squares([wide], self._device) / self._copies[mix(name, piece)]
            squares[block_name(name)] = squares[block_name(name)] + own
        total = torch.stack([squares[part] for part in self._parts])
        return sum_over(total).sqrt()


def _parts_and_copies(engine: Engine) -> tuple[tuple[str, ...], Mapping[int, int]]:
    """All parts of the model, those of the engine first, and how many ranks hold each piece."""
    own = {mix(name, piece): block_name(name) for name, piece, _ in engine.weights()}
    ranks = gather_objects((list(own), sorted(set(own.values()))))
    copies = Counter(place for places, _ in ranks for place in places)
    others = {part for _, parts in ranks for part in parts}.difference(engine.block_names)
    return (*engine.block_names, *sorted(others)), copies


def _named(parts: Sequence[str], values: Tensor) -> dict[str, float | None]:
    """JSON has no NaN."""
    found = values.tolist()
    return {
        part: value if math.isfinite(value) else None
        for part, value in zip(parts, found, strict=True)
    }
