"""A flat slice of a parameter, shown to torch.distributed.checkpoint as rectangles of the tensor.

DeepSpeed's ZeRO gives a rank a flat range [a, b) of a parameter. In the parameter's own shape that is
a few rectangles (at most 3 of a matrix), here with R rows of C columns:

        0 . . . . C
        . . . a x x     the rest of the first row
        x x x x x x     whole rows
        x x b . . .     the start of the last row
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Rectangle(NamedTuple):
    """A box of a tensor that is contiguous in the flattened tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int  # in the flattened tensor


def rectangles(shape: Sequence[int], begin: int, end: int) -> Iterator[Rectangle]:
    """The fewest boxes that make up elements [begin, end) of a row-major tensor, in order."""
    if begin >= end:
        return
    if not shape:
        yield Rectangle((), (), begin)
        return
    inner_shape = tuple(shape[1:])
    inner = math.prod(inner_shape)
    first, head = divmod(begin, inner)
    last, tail = divmod(end, inner)

    def within(row: int, start: int, stop: int) -> Iterator[Rectangle]:
        for box in rectangles(inner_shape, start, stop):
            yield Rectangle((row, *box.offsets), (1, *box.sizes), row * inner + box.begin)

    if first == last:
        yield from within(first, head, tail)
        return
    if head:
        yield from within(first, head, inner)
        first += 1
    if last > first:
        origin = (0,) * len(inner_shape)
        yield Rectangle((first, *origin), (last - first, *inner_shape), first * inner)
    yield from within(last, 0, tail)


class TpShard(NamedTuple):
    """Tensor parallelism of one parameter: this rank holds part `rank` of `size` along `dim`."""

    dim: int
    rank: int
    size: int


class Fragment(torch.Tensor):
    """This rank's flat slice of a parameter: the parameter's global shape, no data of its own.

    flat: the slice, viewed live, so that a save reads it and a load writes it. start: where it begins
    in the flattened parameter of this tensor-parallel rank, which has `shape`; `split` says which part
    of the global tensor that is (None: all of it). Of copies on several ranks only one `writes`.
    """

    _boxes: dict[tuple[int, ...], torch.Tensor]  # offsets in the global tensor -> view of flat
    _writes: bool

    def __new__(  # noqa: D102 - see the class
        cls,
        flat: torch.Tensor,
        start: int,
        shape: Sequence[int],
        *,
        split: TpShard | None = None,
        writes: bool = True,
    ) -> "Fragment":
        stop = start + flat.numel()
        assert flat.dim() == 1, f"a fragment is flat, not {tuple(flat.shape)}"
        assert not flat.numel() or 0 <= start <= stop <= math.prod(shape), (
            f"[{start}, {stop}) is not in {tuple(shape)}"
        )
        whole = list(shape)
        if split is not None:
            whole[split.dim] *= split.size
        fragment: Fragment = torch.Tensor._make_wrapper_subclass(
            cls, tuple(whole), dtype=flat.dtype, device=flat.device
        )
        fragment._boxes = {}
        for box in rectangles(shape, start, stop):
            offsets = list(box.offsets)
            if split is not None:
                offsets[split.dim] += split.rank * shape[split.dim]
            begin = box.begin - start
            view = flat.detach()[begin : begin + math.prod(box.sizes)].view(box.sizes)
            fragment._boxes[tuple(offsets)] = view
        if not math.prod(whole):  # empty tensors need one write item too
            fragment._boxes[(0,) * len(whole)] = flat.detach().view(whole)
        fragment._writes = writes
        return fragment

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a Fragment is only saved and loaded, not computed with: {func}")

    # torch.distributed.checkpoint asks tensors for these three; see its planner_helpers and utils.

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        if not self._writes:
            return []
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), box.size())
            for offsets, box in self._boxes.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, f"{index.fqn}: a fragment's box is found by its offset"
        return self._boxes[tuple(index.offset)]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        boxes = {offsets: tuple(box.shape) for offsets, box in self._boxes.items()}
        return f"Fragment({tuple(self.shape)}, {self.dtype}, boxes={boxes})"
