"""First pass: the raw ids of one slice of the input, written to scratch files. One call is one job of a worker."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any, TypedDict

import crc32c
import numpy as np

from lmscale.base.fs import fsync_file
from lmscale.corpus.shard_format import DTYPES, dtype_for
from lmscale.prepare.documents import documents, slice_sha256
from lmscale.prepare.inputs import Slice
from lmscale.prepare.scratch import Scratch, read_json, write_json
from lmscale.tokenizer.tokenizer import Tokenizer
from lmscale.tokenizer.training import split_text

# A slice with more ids is split into several segments: this bounds the tables of the second pass.
SEGMENT_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class Segment:
    """Whole documents of a slice, in order, as one pair of scratch files."""

    slice: int
    number: int
    documents: int
    tokens: int
    text_bytes: int
    # CRC32Cs of the two scratch files: a run that resumes checks every byte that it reads from disk.
    tokens_crc32c: int
    documents_crc32c: int


@dataclass(frozen=True, slots=True)
class SliceResult:
    """The segments of a finished slice."""

    source: str  # SHA-256 of the raw input
    segments: tuple[Segment, ...]

    @property
    def documents(self) -> int:
        """Documents of all segments."""
        return sum(segment.documents for segment in self.segments)

    @property
    def tokens(self) -> int:
        """Ids of all segments, frames included."""
        return sum(segment.tokens for segment in self.segments)


def tokenize(
    input_slice: Slice,
    *,
    scratch: Scratch,
    tokenizer: Tokenizer,
    text_key: str,
    consumed: Callable[[int], None],
) -> SliceResult:
    """Write the segments of a slice, its .json last; files of an earlier attempt are overwritten."""
    dtype = DTYPES[dtype_for(tokenizer.vocab_size)]
    writer = _SegmentWriter(input_slice.number, scratch, dtype)
    before, after = tokenizer.special.frame()
    with writer:
        for document in documents(input_slice, text_key, consumed):
            writer.add(before)
            for piece in split_text(document) if tokenizer.cuttable else ["".join(document)]:
                writer.add(tokenizer.encode(piece))
                writer.text_bytes += len(piece) if piece.isascii() else len(piece.encode())
            writer.add(after)
            writer.end_document()
    result = SliceResult(slice_sha256(input_slice), tuple(writer.segments))
    rows = [astuple(segment)[2:] for segment in result.segments]
    write_json(scratch.slice(input_slice.number), {"source": result.source, "segments": rows})
    return result


class _SliceFile(TypedDict):
    source: str
    segments: list[tuple[int, int, int, int, int]]  # the fields of Segment from `documents` on


def finished_slice(number: int, scratch: Scratch, itemsize: int) -> SliceResult | None:
    """The result of an earlier run; None if a file is missing or differs from its CRC32C."""
    value = read_json(scratch.slice(number), _SliceFile)
    if value is None:
        return None
    segments = tuple(Segment(number, index, *row) for index, row in enumerate(value["segments"]))
    for segment in segments:
        expected = {
            "tokens": (segment.tokens * itemsize, segment.tokens_crc32c),
            "documents": (segment.documents * 16, segment.documents_crc32c),
        }
        for kind, size_and_sum in expected.items():
            if _size_and_sum(scratch.segment(number, segment.number, kind)) != size_and_sum:
                return None
    return SliceResult(value["source"], segments)


def _size_and_sum(path: Path) -> tuple[int, int]:
    """Bytes and CRC32C of a file; (-1, 0) where it does not exist."""
    size = checksum = 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                size, checksum = size + len(block), crc32c.crc32c(block, checksum)
    except (FileNotFoundError, IsADirectoryError):
        return -1, 0
    return size, checksum


class _SegmentWriter:
    """Writes documents to pairs of segment files; a new pair begins after SEGMENT_TOKENS ids."""

    def __init__(self, number: int, scratch: Scratch, dtype: np.dtype[Any]) -> None:
        self._number, self._scratch, self._dtype = number, scratch, dtype
        self.segments: list[Segment] = []
        self.text_bytes = 0  # of the current document
        self._files: tuple[IO[bytes], IO[bytes]] | None = None
        self._document_tokens = 0
        self._totals = [0, 0, 0]  # documents, tokens, bytes of the current segment
        self._sums = [0, 0]  # CRC32C of its two files

    def __enter__(self) -> "_SegmentWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._close(keep=kind is None)

    def add(self, ids: list[int] | tuple[int, ...]) -> None:
        """Append ids to the current document."""
        self._write(0, np.asarray(ids, dtype=self._dtype).tobytes())
        self._document_tokens += len(ids)

    def end_document(self) -> None:
        """End the current document: the next ids belong to the next one."""
        self._write(1, array("q", [self._document_tokens, self.text_bytes]).tobytes())
        for index, count in enumerate((1, self._document_tokens, self.text_bytes)):
            self._totals[index] += count
        self._document_tokens = self.text_bytes = 0
        if self._totals[1] >= SEGMENT_TOKENS:
            self._close(keep=True)

    def _paths(self) -> Iterator[Path]:
        for kind in ("tokens", "documents"):
            yield self._scratch.segment(self._number, len(self.segments), kind)

    def _write(self, file: int, data: bytes) -> None:
        self._open()[file].write(data)
        self._sums[file] = crc32c.crc32c(data, self._sums[file])

    def _open(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._files is None:
            tokens, table = (path.open("wb") for path in self._paths())
            self._files = tokens, table
        return self._files

    def _close(self, *, keep: bool) -> None:
        if self._files is None:
            return
        try:
            for file in self._files:
                file.close()
        finally:
            self._files = None
        if keep:
            for path in self._paths():
                fsync_file(path)
            totals = (*self._totals, *self._sums)
            self.segments.append(Segment(self._number, len(self.segments), *totals))
            self._totals, self._sums = [0, 0, 0], [0, 0]
