"""Between the passes: which documents each part holds, and reading any stretch of a part's token stream.

A part's stream is its documents in input order, end to end. Where a document lies follows from
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
    """How much a part holds."""

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
    """Where the documents of all parts lie."""

    every: int
    total: int  # documents of all parts
    segments: list[list[int]]  # slice, number in it, index of the first document
    starts: dict[str, list[int]]  # part -> position in its stream of each segment, then its length
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

    Document i is when i mod every = every - 1; of two or more, but fewer than `every`, the last one is.
    """
    documents = np.arange(first, first + count)
    if every == 0:
        return np.zeros(count, bool)
    if 2 <= total < every:
        return np.asarray(documents == total - 1)
    return np.asarray(documents % every == every - 1)


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
        held = heldout_mask(first, segment.documents, every=every, total=total)
        for part, mask in ((TRAIN, ~held), (HELDOUT, held)):
            sums[part] += (mask.sum(), *table[mask].sum(axis=0))
            starts[part].append(int(sums[part][1]))
        first += segment.documents
    sizes = {part: PartSize(*map(int, row)) for part, row in sums.items()}
    kept = {part: size for part, size in sizes.items() if size.documents}
    return Cuts(every, total, rows, {part: starts[part] for part in kept}, kept)


class PartStream:
    """The token stream of one part, read by position."""

    def __init__(self, scratch: Scratch, cuts: Cuts, part: str, dtype: np.dtype[Any]) -> None:
        self._scratch, self._cuts, self._part = scratch, cuts, part
        self._dtype = dtype
        self._starts = np.asarray(cuts.starts[part], np.int64)
        self._held: tuple[int, Ints, Ints, Ints] | None = None

    def read(self, start: int, stop: int) -> tuple[NDArray[np.unsignedinteger[Any]], Ints]:
        """Tokens [start, stop) and where in them documents begin, counted from `start`."""
        tokens: list[NDArray[np.unsignedinteger[Any]]] = []
        begins: list[Ints] = []
        index = int(np.searchsorted(self._starts, start, "right")) - 1
        while index < len(self._cuts.segments) and self._starts[index] < stop:
            if self._starts[index] < self._starts[index + 1]:
                position, offset, length = self._documents(index)
                low = int(np.searchsorted(position + length, start, "right"))
                high = int(np.searchsorted(position, stop, "left"))
                tokens += self._ranges(
                    index, position[low:high], offset[low:high], length[low:high], (start, stop)
                )
                begins.append(position[low:high])
            index += 1
        inside = np.concatenate(begins) if begins else np.zeros(0, np.int64)
        inside = inside[inside >= start] - start
        return np.concatenate(tokens), inside

    def _documents(self, index: int) -> tuple[Ints, Ints, Ints]:
        """Of this part's documents in a segment: position in the stream, offset in the file, length."""
        if self._held is None or self._held[0] != index:
            number, segment, first = self._cuts.segments[index]
            lengths = _table(self._scratch, number, segment)[:, 0]
            held = heldout_mask(first, len(lengths), every=self._cuts.every, total=self._cuts.total)
            mask = held if self._part == HELDOUT else ~held
            offset = (np.cumsum(lengths) - lengths)[mask]
            length = lengths[mask]
            position = self._starts[index] + np.cumsum(length) - length
            self._held = index, position, offset, length
        return self._held[1:]

    def _ranges(
        self, index: int, position: Ints, offset: Ints, length: Ints, bounds: tuple[int, int]
    ) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
        """The tokens of consecutive documents inside bounds; neighbours in the file are read at once."""
        if not len(position):
            return
        number, segment, _ = self._cuts.segments[index]
        path = self._scratch.segment(number, segment, "tokens")
        breaks = np.flatnonzero(offset[1:] != offset[:-1] + length[:-1]) + 1
        for low, high in zip([0, *breaks], [*breaks, len(position)], strict=True):
            begin = max(int(position[low]), bounds[0])
            end = min(int(position[high - 1] + length[high - 1]), bounds[1])
            where = int(offset[low]) + begin - int(position[low])
            run = np.fromfile(path, self._dtype, end - begin, offset=where * self._dtype.itemsize)
            assert len(run) == end - begin, f"{path} is shorter than the run found it at its start"
            yield run


def _table(scratch: Scratch, number: int, segment: int) -> Ints:
    """Ids and bytes of text of each document of a segment, [documents, 2]."""
    return np.fromfile(scratch.segment(number, segment, "documents"), np.int64).reshape(-1, 2)
