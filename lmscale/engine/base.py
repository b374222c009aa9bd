"""What the engines have in common, and nothing more: the trainer owns time, the engine owns the step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from lmscale.base.batch import Batch, Sums


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step found. Scalars on the device, the same on every rank.

    Reading one waits for the device; read them one step late.
    """

    loss: Tensor  # float64: nats per target over the whole step and all ranks, before the update
    weight: Tensor  # float64: weight of all targets of the step
    grad_norm: Tensor  # float64: of the whole gradient, before clipping
    applied: Tensor  # bool: False when the gradient was not finite and nothing was updated
    norms: Tensor | None = None  # with log.layer_stats: grad_norm of each of Engine.parts, float64


class Weight(NamedTuple):
    """A piece of a parameter as this rank computes with it, between two steps."""

    name: str
    piece: str  # ranks that hold the same piece of the same parameter must hold the same bits
    tensor: Tensor


class Engine(Protocol):
    """One model, its optimizer and how both are spread over the ranks.

    Every method is collective: all ranks call it, in the same order.
    """

    def step(self, micro_batches: Sequence[Batch[Tensor]], *, lr: float) -> StepResult:
        """Forward and backward of each micro-batch, one update. All ranks give equally many.

        The gradient is that of the sum of losses divided by the weight of all targets of all
        micro-batches of all ranks. Raises DataError when there is no target at all.
        """

    def evaluate(self, batch: Batch[Tensor]) -> Sums[Tensor]:
        """Loss and weight of this rank's batch, without dropout and without changing anything."""

    def logits(self, batch: Batch[Tensor]) -> Tensor:
        """[B, L, V] of this rank's batch, without dropout and without changing anything."""

    def state(self, loading: bool = False) -> dict[str, Tensor]:
        """Live views of weights and moments under neutral names and global shapes.

        model.NAME of every parameter, optim.exp_avg.NAME and optim.exp_avg_sq.NAME of every trainable
        one, in fp32 or the run's higher precision. `loading`: they are about to be written, so
        whatever is gathered from them must be dropped.
        """

    def loaded(self, *, optim_step: int, loss_scale: float | None = None) -> None:
        """Finish a load into `state(loading=True)`: that many updates led to what was loaded.

        loss_scale: of the run that saved, where it had one; engines without one ignore it.
        """

    @property
    def optim_step(self) -> int:
        """Updates applied so far. Waits for the device."""

    @property
    def loss_scale(self) -> float | None:
        """What fp16 multiplies its loss with now; None in other precisions. Waits for the device."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that StepResult.norms has a number for, in its order (layout.part_of)."""

    def weights(self) -> Iterator[Weight]:
        """Every piece of a parameter that this rank holds, to be compared with other ranks' copies of it."""
