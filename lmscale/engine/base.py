"""One optimizer step, written once: the trainer owns time, an engine owns the step.

`Engine` is both what the trainer sees and the template of a step. An engine states how gradients are
reduced, where this rank's parts of them are and how its optimizer updates them; counting the targets,
scaling the loss, norm, clipping, the decision to skip and the loss scale of fp16 are here.

    step:  count_targets -> per micro-batch: forward, backward -> gradients -> norm, clip -> apply_update
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lmscale.base.batch import Batch, Sums
from lmscale.config.schema import EngineConfig, OptimConfig
from lmscale.distributed.mesh import Mesh
from lmscale.engine.layout import TpLayout, block_name
from lmscale.engine.step import (
    LossScale,
    StepResult,
    clip_gradients,
    configure_update,
    count_targets,
    count_updates,
    reduce_result,
    set_update_count,
    sum_of_squares,
    sum_partial_gradients,
)


class Weight(NamedTuple):
    """A piece of a parameter as this rank computes with it, between two steps."""

    name: str
    piece: str  # ranks that have the same piece of the same parameter must have the same bits
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class EngineInputs:
    """What an engine is built from: `build_engine` makes it, an engine's constructor takes it."""

    model: nn.Module  # after parallel/passes.py; the engine changes it in place
    mesh: Mesh
    engine: EngineConfig
    optim: OptimConfig
    layout: TpLayout
    layer_stats: bool = False


class Engine(ABC):
    """A model, its optimizer, and how both are spread over the ranks.

    Every public method is collective: all ranks call it, in the same order.
    """

    # Set by the constructor of the engine: a fused AdamW over what this rank updates.
    _optimizer: torch.optim.Optimizer

    def __init__(self, inputs: EngineInputs, *, gradient_copies: int) -> None:
        """`gradient_copies`: the number of data-parallel ranks that have the same part of a gradient."""
        self._model = inputs.model
        self._mesh = inputs.mesh
        self._layout = inputs.layout
        self._max_grad_norm = inputs.optim.max_grad_norm
        # Around each forward and its backward, and around evaluation: copies of the weights in low precision.
        self._low_precision: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._loss_scale: LossScale | None = None
        names = [name for name, p in inputs.model.named_parameters() if p.requires_grad]
        self._norm_groups = _norm_groups(
            names, inputs.layout, gradient_copies, by_block=inputs.layer_stats
        )
        # The blocks of the model whose norms StepResult.norms contains, in its order.
        self.block_names = tuple(self._norm_groups) if inputs.layer_stats else ()

    def step(self, micro_batches: Sequence[Batch[Tensor]], *, lr: float) -> StepResult:
        """Forward and backward of each micro-batch, then one update. All ranks pass equally many.

        The gradient is that of the sum of losses divided by the weight of all targets of all
        micro-batches of all ranks. Raises DataError when there is no target at all.
        """
        weight = count_targets(micro_batches, self._mesh)
        scale = self._mesh.dp_size / weight  # every reduction averages over dp
        if self._loss_scale is not None:
            scale = scale * self._loss_scale.scale
        self._prepare_gradients(len(micro_batches))
        losses = []
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with self._micro_step(last=last), self._low_precision():
                sums = self._forward(batch)
                self._backward(sums.loss * scale.to(sums.loss.dtype))
            losses.append(sums.loss.detach())
        self._reduce_gradients()
        with torch.no_grad():
            return self._update(losses, weight, lr=lr)

    def evaluate(self, batch: Batch[Tensor]) -> Sums[Tensor]:
        """Loss and weight of this rank's batch, without dropout and without changing anything."""
        return cast(Sums[Tensor], self._call_without_grad(self._model, batch))

    def logits(self, batch: Batch[Tensor]) -> Tensor:
        """[B, L, V] of this rank's batch, without dropout and without changing anything."""
        return cast(Tensor, self._call_without_grad(cast(Any, self._model).logits, batch))

    @abstractmethod
    def state(self, loading: bool = False) -> dict[str, Tensor]:
        """Live views of weights and moments under neutral names and global shapes.

        model.NAME of every parameter, optim.exp_avg.NAME and optim.exp_avg_sq.NAME of every trainable
        one, in fp32 or the run's higher precision. `loading`: they are about to be written, so
        whatever was gathered from them must be dropped.
        """

    def finish_load(self, *, optim_step: int, loss_scale: float | None = None) -> None:
        """Complete a load into `state(loading=True)`: `optim_step` updates led to what was loaded.

        loss_scale: that of the run that saved, where it had one; engines without one ignore it.
        """
        with torch.no_grad():
            with self._parameters_attached():
                set_update_count(self._optimizer, optim_step)
            self._refresh_weights()
        if self._loss_scale is not None and loss_scale is not None:
            self._loss_scale.resume(loss_scale)

    @property
    def optim_step(self) -> int:
        """Updates applied so far. Waits for the device."""
        with self._parameters_attached():
            return count_updates(self._optimizer)

    @property
    def loss_scale(self) -> float | None:
        """The factor that fp16 multiplies its loss by; None in other precisions. Waits for the device."""
        return None if self._loss_scale is None else self._loss_scale.scale.item()

    @abstractmethod
    def weights(self) -> Iterator[Weight]:
        """Every piece of a parameter that this rank has, to be compared with other ranks' copies of it."""

    # What differs between engines.

    @abstractmethod
    def _forward(self, batch: Batch[Tensor]) -> Sums[Tensor]:
        """A training forward: through the model, or through a wrapper around it."""

    def _backward(self, loss: Tensor) -> None:
        """The backward of one micro-batch."""
        loss.backward()

    def _prepare_gradients(self, micro_batches: int) -> None:  # noqa: B027 - most engines do nothing
        """Before the first forward of a step."""

    def _micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surround a forward and its backward. After the `last` one the gradients are reduced over dp."""
        del last
        return nullcontext()

    def _reduce_gradients(self) -> None:  # noqa: B027 - most engines reduce in the backward
        """After the last backward of a step."""

    @abstractmethod
    def _gradients(self) -> Mapping[str, Tensor]:
        """This rank's part of each reduced gradient by parameter name, as `_apply_update` reads it.

        In the order of the model's parameters, in fp32 or higher. Changed in place before the update.
        """

    @property
    @abstractmethod
    def _optimizer_device(self) -> torch.device:
        """The device of the optimizer's tensors and of `_gradients`: the CPU with offload."""

    @abstractmethod
    def _apply_update(self) -> None:
        """One step of the optimizer, then the weights that the model computes with; frees the gradients."""

    def _parameters_attached(self) -> AbstractContextManager[Any]:
        """Inside, the optimizer's groups contain all tensors that it updates."""
        return nullcontext()

    def _refresh_weights(self) -> None:  # noqa: B027 - without masters there is nothing to refresh
        """After a load: the weights that the model computes with, from the masters that were written."""

    def _release_gathered(self) -> None:  # noqa: B027 - most engines gather nothing
        """Free weights that a forward without a backward has left gathered."""

    def _update(self, losses: list[Tensor], weight: Tensor, *, lr: float) -> StepResult:
        gradients = self._gradients()
        if self._loss_scale is not None:
            self._loss_scale.unscale(list(gradients.values()))
        partial = [g for name, g in gradients.items() if self._layout.partial(name)]
        sum_partial_gradients(partial, self._mesh)
        squares = self._squared_norm(gradients).to(weight.device)
        result = reduce_result(losses, weight, squares, self._mesh)
        clip_gradients(list(gradients.values()), result, self._max_grad_norm)
        with self._parameters_attached():
            configure_update(self._optimizer, lr=lr, applied=result.applied)
        self._apply_update()
        if self._loss_scale is not None:
            self._loss_scale.update(result.applied)
        return result

    def _squared_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """This rank's part of the squared norm: of each block with log.layer_stats, else of all."""
        device = self._optimizer_device
        squares = [
            torch.stack(
                [
                    sum_of_squares([gradients[n] for n in names if n in gradients], device) / copies
                    for copies, names in groups.items()
                ]
            ).sum()
            for groups in self._norm_groups.values()
        ]
        return torch.stack(squares) if self.block_names else squares[0]

    def _call_without_grad(self, method: Callable[..., Any], batch: Batch[Tensor]) -> Any:
        self._model.eval()
        try:
            with torch.no_grad(), self._low_precision():
                return method(batch)
        finally:
            self._model.train()
            self._release_gathered()


def _norm_groups(
    names: Sequence[str], layout: TpLayout, gradient_copies: int, *, by_block: bool
) -> dict[str, dict[int, list[str]]]:
    """Block of the model (one group "" without `by_block`) -> copies of an element over all ranks -> names."""
    groups: dict[str, dict[int, list[str]]] = {}
    for name in names:
        block = block_name(name) if by_block else ""
        copies = gradient_copies * layout.tp_copies(name)
        groups.setdefault(block, {}).setdefault(copies, []).append(name)
    return groups
