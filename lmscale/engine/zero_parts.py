"""Where a DeepSpeed engine keeps what this rank updates, in words that do not depend on the stage.

    stage   weights            gradients                  masters and moments    file
    0       whole              whole, averaged            whole                  zero_whole.py
    1, 2    whole              of the part                of the part            zero_split.py
    3       gathered for use   of the part                of the part            zero_gathered.py

DeepSpeed lays parameters end to end in flat tensors (one a parameter group, or one a parameter in stage 0) and
deals these out over the data-parallel ranks. Its optimizer sees flat tensors only.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmscale.dist.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [start, start + size) of a flattened parameter: what this rank keeps of it."""

    name: str
    shape: torch.Size  # of the parameter on this tp rank
    start: int
    size: int  # 0: the rank keeps nothing of it
    flat: Tensor  # where its fp32 master lies; of a trainable one also the key of its moments
    offset: int  # in flat

    def of(self, flat: Tensor) -> Tensor:
        """This part, taken out of something laid out as `flat` is: the master itself, or a moment."""
        return flat.detach().view(-1).narrow(0, self.offset, self.size)


class Parts(ABC):
    """The parts of all parameters on this rank. Methods without a word about it are not collective."""

    gradient_copies = 1  # data-parallel ranks that hold the same gradient
    cut = ""  # of Weight.piece: which part of a parameter `held` is; empty: all of it

    def __init__(
        self, wrapper: Any, model: nn.Module, mesh: Mesh, exact: Mapping[str, Tensor] | None
    ) -> None:
        """`exact`: the parameters as they were before DeepSpeed rounded them; None where it did not."""
        self._wrapper = wrapper
        self._mesh = mesh
        self._rounded = exact is not None
        named = list(model.named_parameters())
        self.trainable = [self._part(name, p) for name, p in named if p.requires_grad]
        self._still = [(name, p) for name, p in named if not p.requires_grad]
        self.frozen = [self._frozen(name, p, exact) for name, p in self._still]
        if exact is not None:
            self._restore(exact)

    @property
    def home(self) -> torch.device:
        """Where the optimizer works."""
        return self.trainable[0].flat.device

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Of `trainable`, in its order, fp32, after the last backward; `update` reads them from there."""

    @abstractmethod
    def update(self) -> None:
        """One step of the optimizer, then weights from masters, then no gradient is left. Collective."""

    def refresh(self) -> None:
        """Weights from masters, which somebody has written. Collective."""
        for (_, parameter), part in zip(self._still, self.frozen, strict=True):
            if self._rounded:
                self.held(parameter)[0].copy_(part.flat)

    @abstractmethod
    def held(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """What this rank keeps of the weight that it computes with, flat, and where that begins."""

    def reduce(self) -> None:  # noqa: B027 - nothing to do is the rule
        """After the last backward of a step; most stages have reduced in the backward. Collective."""

    def let_go(self) -> None:  # noqa: B027
        """Of weights that a forward without a backward has left gathered. Collective."""

    @contextmanager
    def listed(self) -> Iterator[None]:
        """Inside, the optimizer's groups list all flat tensors."""
        yield

    @abstractmethod
    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        """Of a trainable parameter."""

    def _frozen(
        self, name: str, parameter: nn.Parameter, exact: Mapping[str, Tensor] | None
    ) -> Part:
        flat, start = self.held(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if exact is not None:
            flat = exact[name].view(-1).narrow(0, start, flat.numel()).clone()
        return Part(name, shape, start, flat.numel(), flat, 0)

    @torch.no_grad()
    def _restore(self, exact: Mapping[str, Tensor]) -> None:
        for part in self.trainable:
            part.of(part.flat).copy_(exact[part.name].view(-1).narrow(0, part.start, part.size))


def flatten_groups(groups: Sequence[Sequence[Any]]) -> dict[int, tuple[int, int]]:
    """id of each parameter -> (its group, its place there)."""
    return {
        id(parameter): (index, place)
        for index, group in enumerate(groups)
        for place, parameter in enumerate(group)
    }
