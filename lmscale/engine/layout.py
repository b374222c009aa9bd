"""Which part of a parameter each tp rank has, as a pure function of the parameter's name."""

from collections.abc import Sequence

from torch import Tensor

from lmscale.checkpoint.fragment import Fragment, TpShard
from lmscale.distributed.mesh import Mesh
from lmscale.modelspec.tensor_parallel import sums_over_tokens, tp_dim


class TpLayout:
    """What norms and checkpoints need of a model that parallel/tensor.py has split.

    Over tp a parameter is an ordinary tensor that is smaller, under every engine: no DTensor, so one
    forward serves all, and an engine splits the local tensor further over dp as if it were the whole.
    """

    def __init__(self, mesh: Mesh, *, sequence_parallel: bool) -> None:
        self._mesh = mesh
        self._sequence_parallel = sequence_parallel and mesh.tp_size > 1

    def split(self, name: str) -> TpShard | None:
        """Which part of the global tensor this tp rank has; None: all of it."""
        dim = tp_dim(name) if self._mesh.tp_size > 1 else None
        return None if dim is None else TpShard(dim, self._mesh.tp_rank, self._mesh.tp_size)

    def tp_copies(self, name: str) -> int:
        """The number of tp ranks that have the same elements of it."""
        return self._mesh.tp_size if self.split(name) is None else 1

    def partial(self, name: str) -> bool:
        """Whether its gradient must be summed over tp (step.sum_partial_gradients)."""
        return self._sequence_parallel and sums_over_tokens(name)

    def fragment(self, name: str, flat: Tensor, *, start: int, shape: Sequence[int]) -> Tensor:
        """A view for checkpoints: `flat` is elements [start, ...) of this tp rank's tensor of `shape`.

        Copies on other ranks are written once: the save planner drops boxes that it has already planned.
        """
        return Fragment(flat, start, shape, split=self.split(name))

    def piece(self, name: str, dp_piece: str = "") -> str:
        """Names the part of the global tensor (Weight.piece); `dp_piece`: what the engine splits over dp."""
        split = self.split(name)
        return dp_piece if split is None else f"tp {split.rank}/{split.size} {dp_piece}".rstrip()


def block_name(name: str) -> str:
    """The block of the model that a parameter belongs to in statistics; outside of blocks, its module."""
    names = name.split(".")
    return ".".join(names[:3] if names[1] == "blocks" else names[:-1])
