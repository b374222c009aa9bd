"""The cuts between the passes: which documents each part contains, and any range of a part's token stream.

The stream of a part is its documents in input order, concatenated. The position of a document follows from
prefix sums over the segments of the first pass, so any worker can write any shard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from lmscale.prepare.scratch import Scratch, read_json, write_json
from lmscale.prepare.tokenize import Segment

TRAIN, HELDOUT = "train", "heldout"

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PartSize:
    """The size of a part."""

    documents: int
    tokens: int
    text_bytes: int


class _CutsFile(TypedDict):
    every: int
    total: int
    segments: list[list[int]]
    starts: dict[str, list[int]]
    sizes: dict[str, tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Cuts:
    """The positions of the documents of all parts."""

    every: int  # every n-th document is held out; 0: none is
    total: int  # documents of all parts
    segments: list[list[int]]  # slice, number within the slice, index of the first document
    starts: dict[
        str, list[int]
    ]  # part -> position of each segment in its stream, then the length of the stream
    sizes: dict[str, PartSize]

    def save(self, scratch: Scratch) -> None:
        """Write cuts.json, for the workers of the second pass."""
        sizes = {
            name: [size.documents, size.tokens, size.text_bytes]
            for name, size in self.sizes.items()
        }
        write_json(
            scratch.cuts,
            {"every": self.every, "total": self.total, "segments": self.segments,
             "starts": self.starts, "sizes": sizes},
        )  # fmt: skip

    @classmethod
    def load(cls, scratch: Scratch) -> "Cuts":
        """Read cuts.json."""
        value = read_json(scratch.cuts, _CutsFile)
        assert value is not None, f"{scratch.cuts} was written by this run"
        sizes = {name: PartSize(*row) for name, row in value["sizes"].items()}
        return cls(value["every"], value["total"], value["segments"], value["starts"], sizes)


def heldout_mask(first: int, count: int, *, every: int, total: int) -> NDArray[np.bool_]:
    """Which of the documents first .. first + count - 1 are held out, of `total` in all.

    Document i is held out when i mod every = every - 1; of two or more documents, but fewer than `every`,
    the last one is held out.
    """
    indices = np.arange(first, first + count)
    if every == 0:
        return np.zeros(count, bool)
    if 2 <= total < every:
        return np.asarray(indices == total - 1)
    return np.asarray(indices % every == every - 1)


def compute_cuts(segments: Sequence[Segment], scratch: Scratch, *, every: int) -> Cuts:
    """Prefix sums over the document tables of all segments; reads one table at a time."""
    total = sum(segment.documents for segment in segments)
    rows: list[list[int]] = []
    starts: dict[str, list[int]] = {TRAIN: [0], HELDOUT: [0]}
    sums = {TRAIN: np.zeros(3, np.int64), HELDOUT: np.zeros(3, np.int64)}
    first = 0
    for segment in segments:
        rows.append([segment.slice, segment.number, first])
        table = _table(scratch, segment.slice, segment.number)
        heldout = heldout_mask(first, segment.documents, every=every, total=total)
        for part, mask in ((TRAIN, ~heldout), (HELDOUT, heldout)):
            sums[part] += (mask.sum(), *table[mask].sum(axis=0))
            starts[part].append(int(sums[part][1]))
        first += segment.documents
    sizes = {part: PartSize(*map(int, row)) for part, row in sums.items()}
    sizes = {part: size for part, size in sizes.items() if size.documents}
    return Cuts(every, total, rows, {part: starts[part] for part in sizes}, sizes)


class PartStream:
    """The token stream of one part, read by position."""

    def __init__(self, scratch: Scratch, cuts: Cuts, part: str, dtype: np.dtype[Any]) -> None:
        self._scratch, self._cuts, self._part = scratch, cuts, part
        self._dtype = dtype
        self._starts = np.asarray(cuts.starts[part], np.int64)
        self._cache: tuple[int, Ints, Ints, Ints] | None = None  # `_documents` of one segment

    def read(self, start: int, stop: int) -> tuple[NDArray[np.unsignedinteger[Any]], Ints]:
        """Tokens [start, stop) and the positions where documents begin, counted from `start`."""
        tokens: list[NDArray[np.unsignedinteger[Any]]] = []
        documents: list[Ints] = []
        index = int(np.searchsorted(self._starts, start, "right")) - 1
        while index < len(self._cuts.segments) and self._starts[index] < stop:
            if self._starts[index] < self._starts[index + 1]:
                position, offset, length = self._documents(index)
                low = int(np.searchsorted(position + length, start, "right"))
                high = int(np.searchsorted(position, stop, "left"))
                tokens += self._ranges(
                    index, position[low:high], offset[low:high], length[low:high], (start, stop)
                )
                documents.append(position[low:high])
            index += 1
        begins = np.concatenate(documents) if documents else np.zeros(0, np.int64)
        return np.concatenate(tokens), begins[begins >= start] - start

    def _documents(self, index: int) -> tuple[Ints, Ints, Ints]:
        """Positions in the stream, offsets in the file and lengths of this part's documents of a segment."""
        if self._cache is None or self._cache[0] != index:
            number, segment, first = self._cuts.segments[index]
            lengths = _table(self._scratch, number, segment)[:, 0]
            mask = heldout_mask(first, len(lengths), every=self._cuts.every, total=self._cuts.total)
            if self._part != HELDOUT:
                mask = ~mask
            offset = (np.cumsum(lengths) - lengths)[mask]
            length = lengths[mask]
            position = self._starts[index] + np.cumsum(length) - length
            self._cache = index, position, offset, length
        return self._cache[1:]

    def _ranges(
        self, index: int, position: Ints, offset: Ints, length: Ints, bounds: tuple[int, int]
    ) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
        """The tokens of consecutive documents within bounds; documents adjacent in the file are read at once."""
        if not len(position):
            return
        number, segment, _ = self._cuts.segments[index]
        path = self._scratch.segment(number, segment, "tokens")
        breaks = np.flatnonzero(offset[1:] != offset[:-1] + length[:-1]) + 1
        for low, high in zip([0, *breaks], [*breaks, len(position)], strict=True):
            begin = max(int(position[low]), bounds[0])
            end = min(int(position[high - 1] + length[high - 1]), bounds[1])
            skipped = int(offset[low]) + begin - int(position[low])  # tokens of the file
            tokens = np.fromfile(
                path, self._dtype, end - begin, offset=skipped * self._dtype.itemsize
            )
            assert len(tokens) == end - begin, f"{path} has become shorter during the run"
            yield tokens


def _table(scratch: Scratch, number: int, segment: int) -> Ints:
    """Number of ids and bytes of text of each document of a segment: [documents, 2]."""
    return np.fromfile(scratch.segment(number, segment, "documents"), np.int64).reshape(-1, 2)
