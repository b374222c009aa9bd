"""Who holds which part of a parameter over the tp axis: pure functions of its name."""

from collections.abc import Sequence

from torch import Tensor

from lmscale.checkpoint.fragment import Fragment, TpShard
from lmscale.distributed.mesh import Mesh
from lmscale.model.tp_plan import cut_dim, sums_over_tokens


class TpLayout:
    """What books and checkpoints must know of a model that parallel/tensor.py has cut.

    Over tp a parameter is an ordinary tensor that is smaller, under every engine: no DTensor, so one
    forward serves all, and an engine cuts the local tensor further over dp as if it were the whole.
    """

    def __init__(self, mesh: Mesh, *, sequence_parallel: bool) -> None:
        self._mesh = mesh
        self._sequence_parallel = sequence_parallel and mesh.tp_size > 1

    def split(self, name: str) -> TpShard | None:
        """Which part of the global tensor this tp rank has; None: all of it."""
        dim = cut_dim(name) if self._mesh.tp_size > 1 else None
        return None if dim is None else TpShard(dim, self._mesh.tp_rank, self._mesh.tp_size)

    def tp_copies(self, name: str) -> int:
        """Tp ranks that hold the same elements of it."""
        return self._mesh.tp_size if self.split(name) is None else 1

    def partial(self, name: str) -> bool:
        """Whether its gradient must be summed over tp (account.sum_partial)."""
        return self._sequence_parallel and sums_over_tokens(name)

    def fragment(self, name: str, flat: Tensor, *, start: int, shape: Sequence[int]) -> Tensor:
        """A view for checkpoints: `flat` is elements [start, ...) of this tp rank's tensor of `shape`.

        Copies on other ranks are written once: the save planner drops boxes that it has seen.
        """
        return Fragment(flat, start, shape, split=self.split(name))

    def piece(self, name: str, part: str = "") -> str:
        """Of Weight: which part of the global tensor; `part` says what the engine has cut besides."""
        split = self.split(name)
        return part if split is None else f"tp {split.rank}/{split.size} {part}".rstrip()


def part_of(name: str) -> str:
    """The part of the model that a parameter is counted with in statistics: a block, or its module."""
    words = name.split(".")
    return ".".join(words[:3] if words[1] == "blocks" else words[:-1])
