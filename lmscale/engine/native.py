"""The step of an engine whose gradients torch reduces and whose optimizer is torch's own: FSDP2 and DDP."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmscale.batch import Batch, Sums
from lmscale.config.sections import OptimConfig
from lmscale.dist.mesh import Mesh
from lmscale.engine import account, adam
from lmscale.engine.protocol import StepResult
from lmscale.optim.build import build_adamw, parameter_groups


@dataclass(frozen=True, slots=True)
class Owned:
    """A trainable parameter and the part of it that this rank updates."""

    name: str
    parameter: nn.Parameter
    local: Tensor  # the same memory as the parameter's


class NativeEngine(ABC):
    """See Engine. The optimizer works on local tensors: no DTensor is dispatched in a step."""

    def __init__(
        self, model: nn.Module, forward: Callable[..., Any], mesh: Mesh, optim: OptimConfig
    ) -> None:
        """`forward` is what a training forward goes through: the model, or a wrapper around it."""
        self._model = model
        self._forward = forward
        self._mesh = mesh
        self._clip = optim.clip
        self._owned = [
            Owned(name, parameter, self._local(parameter))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        groups = parameter_groups(
            ((owned.name, owned.local) for owned in self._owned), optim.weight_decay
        )
        self._adam = build_adamw(groups, optim, fused=True)
        adam.materialise(self._adam)

    def step(self, micro_batches: Sequence[Batch[Tensor]], *, lr: float) -> StepResult:
        """One optimizer step; see Engine."""
        weight = account.count_targets(micro_batches, self._mesh)
        scale = self._mesh.dp_size / weight  # both reductions average over dp
        losses = []
        for index, batch in enumerate(micro_batches):
            with self._micro_step(reduce=index == len(micro_batches) - 1):
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
        found = {f"model.{name}": value.detach() for name, value in self._model.named_parameters()}
        for owned in self._owned:
            moments = self._adam.state[owned.local]
            for key in adam.MOMENTS:
                found[f"optim.{key}.{owned.name}"] = self._global(owned, moments[key])
        return found

    def loaded(self, *, optim_step: int) -> None:
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
        gradients = [owned.local.grad for owned in self._owned if owned.local.grad is not None]
        squares = account.sum_of_squares(gradients, weight.device) / self._copies
        result = account.close(losses, weight, squares, self._mesh)
        account.clip(gradients, result, self._clip)
        adam.prepare(self._adam, lr=lr, applied=result.applied)
        self._adam.step()
        for owned in self._owned:
            owned.local.grad = owned.parameter.grad = None
        return result

    def _look(self, method: Callable[..., Any], batch: Batch[Tensor]) -> Any:
        self._model.eval()
        try:
            with torch.no_grad(), self._micro_step(reduce=False):
                return method(batch)
        finally:
            self._model.train()
            self._drop_gathered()

    @property
    @abstractmethod
    def _copies(self) -> int:
        """Ranks that hold the same gradient, and so count it together once."""

    @abstractmethod
    def _micro_step(self, *, reduce: bool) -> AbstractContextManager[Any]:
        """Around a forward and its backward; only with `reduce` gradients are reduced over the ranks."""

    @abstractmethod
    def _local(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter or gradient, in the same memory."""

    @abstractmethod
    def _global(self, owned: Owned, moment: Tensor) -> Tensor:
        """The moment under the parameter's global shape."""

    @abstractmethod
    def _drop_gathered(self) -> None:
        """Forget weights gathered in a forward: what they were gathered from is about to change."""
