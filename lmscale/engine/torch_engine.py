"""What FSDP2 and DDP share: gradients that torch reduces, and torch's optimizer on local tensors."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lmscale.base.batch import Batch, Sums
from lmscale.engine.base import Engine, EngineInputs, Weight
from lmscale.engine.step import MOMENTS, create_moments
from lmscale.optim.optimizer import build_adamw, parameter_groups


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A trainable parameter and the part of it that this rank updates."""

    name: str
    parameter: nn.Parameter
    local: Tensor  # the same memory as the parameter's


class TorchEngine(Engine):
    """The optimizer works on local tensors: no DTensor is dispatched in a step."""

    # Which part of a parameter the data-parallel split gives this rank; empty: all of it.
    _piece = ""

    def __init__(
        self, inputs: EngineInputs, forward: Callable[..., Any], *, gradient_copies: int
    ) -> None:
        """`forward` is what a training forward goes through: the model, or a wrapper around it."""
        super().__init__(inputs, gradient_copies=gradient_copies)
        self._training_forward = forward
        self._parameters = [
            LocalParameter(name, parameter, self._local(parameter))
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        ]
        groups = parameter_groups(
            ((trained.name, trained.local) for trained in self._parameters),
            inputs.optim.weight_decay,
        )
        self._optimizer = build_adamw(groups, inputs.optim, fused=True)
        create_moments(self._optimizer)

    @override
    def state(self, loading: bool = False) -> dict[str, Tensor]:
        if loading:
            self._release_gathered()
        state = {
            f"model.{name}": self._fragment(name, parameter, self._local(parameter))
            for name, parameter in self._model.named_parameters()
        }
        for trained in self._parameters:
            moments = self._optimizer.state[trained.local]
            for key in MOMENTS:
                fragment = self._fragment(trained.name, trained.parameter, moments[key])
                state[f"optim.{key}.{trained.name}"] = fragment
        return state

    @override
    def weights(self) -> Iterator[Weight]:
        for name, parameter in self._model.named_parameters():
            piece = self._layout.piece(name, self._piece)
            yield Weight(name, piece, self._local(parameter).detach())

    @override
    def _forward(self, batch: Batch[Tensor]) -> Sums[Tensor]:
        return cast(Sums[Tensor], self._training_forward(batch))

    @override
    def _gradients(self) -> Mapping[str, Tensor]:
        gradients = {}
        for trained in self._parameters:
            gradient = trained.parameter.grad
            trained.local.grad = None if gradient is None else self._local(gradient)
            if trained.local.grad is not None:
                gradients[trained.name] = trained.local.grad
        return gradients

    @property
    @override
    def _optimizer_device(self) -> torch.device:
        return self._parameters[0].local.device

    @override
    def _apply_update(self) -> None:
        self._optimizer.step()
        self._release_gradients()

    def _release_gradients(self) -> None:
        """After the update: free the memory of the gradients."""
        for trained in self._parameters:
            trained.local.grad = trained.parameter.grad = None

    def _fragment(self, name: str, parameter: Tensor, local: Tensor) -> Tensor:
        """For checkpoints: this rank's part of the parameter, or of a moment of it."""
        flat = local.detach().view(-1)
        return self._layout.fragment(
            name, flat, start=self._offset(parameter), shape=parameter.shape
        )

    @abstractmethod
    def _local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter or gradient, in the same memory."""

    @abstractmethod
    def _offset(self, parameter: Tensor) -> int:
        """Where the local part begins in the flattened parameter of this tp rank."""
