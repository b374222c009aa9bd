"""The step of an engine whose gradients torch reduces and whose optimizer is torch's own: FSDP2 and DDP."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmscale.base.batch import Batch, Sums
from lmscale.config.schema import OptimConfig
from lmscale.distributed.mesh import Mesh
from lmscale.engine import step as account
from lmscale.engine import step as adam
from lmscale.engine.base import StepResult, Weight
from lmscale.engine.layout import TpLayout, part_of
from lmscale.optim.optimizer import build_adamw, parameter_groups


@dataclass(frozen=True, slots=True)
class Owned:
    """A trainable parameter and the part of it that this rank updates."""

    name: str
    parameter: nn.Parameter
    local: Tensor  # the same memory as the parameter's


class TorchEngine(ABC):
    """See Engine. The optimizer works on local tensors: no DTensor is dispatched in a step."""

    loss_scale: float | None = None

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        mesh: Mesh,
        optim: OptimConfig,
        layout: TpLayout,
        *,
        layer_stats: bool,
    ) -> None:
        """`forward` is what a training forward goes through: the model, or a wrapper around it."""
        self._model = model
        self._forward = forward
        self._mesh = mesh
        self._layout = layout
        self._clip = optim.max_grad_norm
        self._owned = [
            Owned(name, parameter, self._local(parameter))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        self._home = self._owned[0].local.device  # where the optimizer works
        self._partial = [owned for owned in self._owned if layout.partial(owned.name)]
        self.parts: tuple[str, ...] = ()
        if layer_stats:
            self.parts = tuple(dict.fromkeys(part_of(owned.name) for owned in self._owned))
        self._counted = self._count_together()
        groups = parameter_groups(
            ((owned.name, owned.local) for owned in self._owned), optim.weight_decay
        )
        self._adam = build_adamw(groups, optim, fused=True)
        adam.materialise(self._adam)

    def step(self, micro_batches: Sequence[Batch[Tensor]], *, lr: float) -> StepResult:
        """One optimizer step; see Engine."""
        weight = account.count_targets(micro_batches, self._mesh)
        scale = self._mesh.dp_size / weight  # every reduction averages over dp
        self._prepare_gradients(len(micro_batches))
        losses = []
        for index, batch in enumerate(micro_batches):
            with self._micro_step(last=index == len(micro_batches) - 1):
                sums: Sums[Tensor] = self._forward(batch)
                (sums.loss * scale.to(sums.loss.dtype)).backward()
            losses.append(sums.loss.detach())
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
        if loading:
            self._drop_gathered()
        found = {
            f"model.{name}": self._shown(name, parameter, self._local(parameter))
            for name, parameter in self._model.named_parameters()
        }
        for owned in self._owned:
            moments = self._adam.state[owned.local]
            for key in adam.MOMENTS:
                shown = self._shown(owned.name, owned.parameter, moments[key])
                found[f"optim.{key}.{owned.name}"] = shown
        return found

    def weights(self) -> Iterator[Weight]:
        """What this rank stores; see Engine."""
        for name, parameter in self._model.named_parameters():
            piece = self._layout.piece(name, self._part)
            yield Weight(name, piece, self._local(parameter).detach())

    def loaded(self, *, optim_step: int, loss_scale: float | None = None) -> None:
        """Finish a load; see Engine."""
        adam.set_count(self._adam, optim_step)

    @property
    def optim_step(self) -> int:
        """Updates applied so far."""
        return adam.count(self._adam)

    def _update(self, losses: list[Tensor], weight: Tensor, *, lr: float) -> StepResult:
        for owned in self._owned:
            gradient = owned.parameter.grad
            owned.local.grad = None if gradient is None else self._local(gradient)
        account.sum_partial(_gradients(self._partial), self._mesh)
        squares = self._squares().to(weight.device)
        result = account.close(losses, weight, squares, self._mesh)
        # With offload the gradients are on another device than the losses: only then this waits.
        at_home = replace(result, grad_norm=result.grad_norm.to(self._home))
        account.clip(_gradients(self._owned), at_home, self._clip)
        adam.prepare(self._adam, lr=lr, applied=result.applied)
        self._adam.step()
        self._release_gradients()
        return result

    def _squares(self) -> Tensor:
        """This rank's share of the squared norm: of each part with log.layer_stats, else of all."""
        found = [
            torch.stack(
                [
                    account.sum_of_squares(_gradients(owned), self._home) / copies
                    for copies, owned in counted.items()
                ]
            ).sum()
            for counted in self._counted
        ]
        return torch.stack(found) if self.parts else found[0]

    def _count_together(self) -> list[dict[int, list[Owned]]]:
        """For each part (without log.layer_stats there is one): parameters by ranks that hold the same of them."""
        found: dict[str, dict[int, list[Owned]]] = {}
        for owned in self._owned:
            part = part_of(owned.name) if self.parts else ""
            copies = self._copies * self._layout.tp_copies(owned.name)
            found.setdefault(part, {}).setdefault(copies, []).append(owned)
        return list(found.values())

    def _shown(self, name: str, parameter: Tensor, local: Tensor) -> Tensor:
        """For checkpoints: this rank's part of the parameter, or of a moment of it."""
        flat = local.detach().view(-1)
        return self._layout.fragment(
            name, flat, start=self._offset(parameter), shape=parameter.shape
        )

    def _look(self, method: Callable[..., Any], batch: Batch[Tensor]) -> Any:
        self._model.eval()
        try:
            with torch.no_grad(), self._micro_step(last=False):
                return method(batch)
        finally:
            self._model.train()
            self._drop_gathered()

    def _release_gradients(self) -> None:
        """After the update: the gradients are of no more use."""
        for owned in self._owned:
            owned.local.grad = owned.parameter.grad = None

    @property
    @abstractmethod
    def _copies(self) -> int:
        """Data-parallel ranks that hold the same gradient, and so count it together once."""

    @property
    @abstractmethod
    def _part(self) -> str:
        """Which part of a parameter the data-parallel cut gives this rank; empty: all of it."""

    @abstractmethod
    def _prepare_gradients(self, micro_batches: int) -> None:
        """Before the first forward of a step."""

    @abstractmethod
    def _micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and its backward. `last` of a step: after it the gradient is everyone's."""

    @abstractmethod
    def _local(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter or gradient, in the same memory."""

    @abstractmethod
    def _offset(self, parameter: Tensor) -> int:
        """Where the local part begins in the flattened parameter of this tp rank."""

    @abstractmethod
    def _drop_gathered(self) -> None:
        """Forget weights gathered in a forward: what they were gathered from is about to change."""


def _gradients(owned: Sequence[Owned]) -> list[Tensor]:
    return [one.local.grad for one in owned if one.local.grad is not None]
