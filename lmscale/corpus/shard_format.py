"""The format of one shard: a plain tar of chunks, whose last member is their index.

The bytes are a function of the chunks alone (no time, user or mode of the writer), so that any number of
workers, killed and started again, writes the same corpus.

    00000017.u16        chunk_tokens + 1 raw little-endian tokens; the last is the first of chunk 18
    00000017.docs.u32   offsets at which documents start inside the chunk (optional)
    ...
    __lmidx__           the index: offsets of each chunk, and one CRC32C per block of 64 KiB

The index, in little-endian integers:

    "LMIDX" and version 1 as 8 bytes | u32 bytes per token | u32 bytes per block
    u64 first chunk | u64 chunks
    one row per chunk: u64 offset of its tokens in the tar, u64 tokens, u64 offset of its document
        starts, u64 starts
    one u32 CRC32C per block: of chunk 0's tokens, of its starts, of chunk 1's tokens, ...
    u32 CRC32C of everything before

The first block of a member begins with its first byte and only its last block may be shorter, so a
sample can be checked without the rest of its chunk. A chunk without document starts has offset 0 there.
"""

import hashlib
import struct
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import crc32c
import numpy as np
from numpy.typing import NDArray

from lmscale.base.fs import atomic_writer, storage_errors

INDEX_NAME = "__lmidx__"  # webdataset skips members named __*__
BLOCK_BYTES = 65_536
START_BYTES = 4  # a document start is a u32

Member = Literal["tokens", "starts"]

_MAGIC = b"LMIDX\0\0\1"
_HEADER = struct.Struct("<8sIIQQ")
_CRC = struct.Struct("<I")


Dtype = Literal["u16", "u32"]
DTYPES: dict[Dtype, np.dtype[Any]] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}


class Chunk(NamedTuple):
    """The content of one chunk, as `write_shard` takes it."""

    tokens: NDArray[np.integer[Any]]  # [chunk_tokens + 1], the corpus' last chunk may be shorter
    starts: NDArray[np.integer[Any]] | None  # ascending, in [0, len(tokens)); None: unknown


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """The manifest's entry for one shard."""

    name: str  # file name inside the corpus folder
    bytes: int
    sha256: str  # of the whole file
    index_offset: int  # of the index in the file
    index_bytes: int
    index_crc32c: int  # ties the block CRCs to the manifest: a shard of another corpus is refused
    chunks: int
    tokens: int  # stored; neighbouring chunks share one token


def dtype_for(vocab_size: int) -> Dtype:
    """The smallest dtype for every id of a vocabulary."""
    return "u16" if vocab_size <= 1 << 16 else "u32"


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"


def num_chunks(tokens: int, chunk_tokens: int) -> int:
    """The number of chunks of a stream of `tokens` tokens."""
    return max(0, -(-(tokens - 1) // chunk_tokens))


def chunk_range(chunk: int, *, tokens: int, chunk_tokens: int) -> tuple[int, int]:
    """The tokens [first, stop) of the stream that a chunk stores; the last is the next chunk's first.

    A document that starts at that last token is in the `starts` of both chunks: in the sample that
    ends with it, the last target belongs to another document.
    """
    first = chunk * chunk_tokens
    return first, min(first + chunk_tokens + 1, tokens)


class Extent(NamedTuple):
    """A member's bytes inside its tar, and the CRC32C of each of its blocks."""

    offset: int
    bytes: int
    crcs: NDArray[np.uint32]


class IndexEntry(NamedTuple):
    """The row of one chunk in the index."""

    offset: int  # of its tokens, in the tar
    tokens: int
    starts_offset: int  # of its document starts, in the tar; 0: the chunk has none
    starts: int


@dataclass(frozen=True, slots=True)
class ChunkIndex:
    """The chunks of one shard. Chunk numbers are those of the corpus."""

    first_chunk: int
    token_bytes: int  # 2 | 4
    block_bytes: int
    rows: NDArray[np.int64]  # [chunks, 4], columns as in IndexEntry
    crcs: NDArray[np.uint32]
    firsts: NDArray[np.int64]  # [2 * chunks + 1]: index in crcs of each member's first block

    @property
    def num_chunks(self) -> int:
        """Chunks of this shard."""
        return len(self.rows)

    def tokens(self, chunk: int) -> Extent:
        """The tokens of a chunk of the corpus."""
        row = self._row(chunk)
        return self._extent(
            2 * (chunk - self.first_chunk), row.offset, row.tokens * self.token_bytes
        )

    def starts(self, chunk: int) -> Extent | None:
        """The document starts of a chunk of the corpus; None where it has no such member."""
        row = self._row(chunk)
        if not row.starts_offset:
            return None
        which = 2 * (chunk - self.first_chunk) + 1
        return self._extent(which, row.starts_offset, row.starts * START_BYTES)

    def member(self, chunk: int, member: Member) -> Extent:
        """The tokens or the document starts of a chunk; missing document starts are an empty extent."""
        extent = self.tokens(chunk) if member == "tokens" else self.starts(chunk)
        return extent or Extent(0, 0, self.crcs[:0])

    def _row(self, chunk: int) -> IndexEntry:
        return IndexEntry(*(int(value) for value in self.rows[chunk - self.first_chunk]))

    def _extent(self, member: int, offset: int, size: int) -> Extent:
        return Extent(offset, size, self.crcs[self.firsts[member] : self.firsts[member + 1]])


def block_crcs(data: bytes | memoryview) -> list[int]:
    """One CRC32C per block of a member."""
    view = memoryview(data)
    return [
        crc32c.crc32c(view[start : start + BLOCK_BYTES])
        for start in range(0, len(view), BLOCK_BYTES)
    ]


def pack_index(
    rows: Sequence[IndexEntry],
    crcs: Sequence[int],
    *,
    first_chunk: int,
    token_bytes: int,
    block_bytes: int = BLOCK_BYTES,
) -> bytes:
    """The bytes of an index; `crcs` are those of all members, in order."""
    body = b"".join(
        (
            _HEADER.pack(_MAGIC, token_bytes, block_bytes, first_chunk, len(rows)),
            np.array(rows, dtype="<u8").tobytes(),
            np.array(crcs, dtype="<u4").tobytes(),
        )
    )
    return body + _CRC.pack(crc32c.crc32c(body))


def stored_crc32c(data: bytes) -> int:
    """The CRC32C in the last bytes of an index."""
    return int.from_bytes(data[-_CRC.size :], "little")


def parse_index(data: bytes | memoryview, *, index_crc32c: int) -> ChunkIndex:
    """Read an index whose last bytes are the CRC32C `index_crc32c`. Raises ValueError with the reason."""
    view = memoryview(data)
    if len(view) < _HEADER.size + _CRC.size:
        raise ValueError(f"the index has only {len(view)} bytes")
    body = view[: -_CRC.size]
    computed, stored = crc32c.crc32c(body), stored_crc32c(bytes(view[-_CRC.size :]))
    if (computed, stored) != (index_crc32c, index_crc32c):
        raise ValueError(f"the index has CRC32C {computed:08x}, expected {index_crc32c:08x}")
    magic, token_bytes, block_bytes, first_chunk, chunks = _HEADER.unpack_from(body)
    if magic != _MAGIC:
        raise ValueError(f"the index begins with {magic!r}, expected {_MAGIC!r}")
    table = np.frombuffer(body, dtype="<u8", count=4 * chunks, offset=_HEADER.size)
    rows = table.astype(np.int64).reshape(chunks, 4)
    sizes = rows[:, 1::2] * np.array([token_bytes, START_BYTES])
    firsts = np.concatenate(([0], np.cumsum(-(-sizes.ravel() // block_bytes))))
    crcs = np.frombuffer(body, dtype="<u4", offset=_HEADER.size + table.nbytes).astype(np.uint32)
    if len(crcs) != firsts[-1]:
        raise ValueError(
            f"the index has {len(crcs)} block CRCs, its chunks have {firsts[-1]} blocks"
        )
    return ChunkIndex(first_chunk, token_bytes, block_bytes, rows, crcs, firsts)


def write_shard(
    path: Path, chunks: Iterable[Chunk], *, first_chunk: int, dtype: Dtype
) -> ShardEntry:
    """Write chunks `first_chunk`, `first_chunk` + 1, ... to a tar, which appears complete or not at all.

    One chunk is in memory at a time. Raises RetryableError or ConfigError where writing fails, for
    instance on a full disk.
    """
    rows: list[IndexEntry] = []
    crcs: list[int] = []
    with storage_errors(f"writing {path}"), atomic_writer(path, single_writer=True) as file:
        tar = _Tar(file)
        for number, chunk in enumerate(chunks, first_chunk):
            tokens = _tokens(chunk, dtype)
            offset = tar.add(f"{number:08d}.{dtype}", tokens)
            crcs += block_crcs(tokens)
            starts = _starts(chunk)
            starts_offset = 0
            if starts is not None:
                starts_offset = tar.add(f"{number:08d}.docs.u32", starts)
                crcs += block_crcs(starts)
            rows.append(
                IndexEntry(offset, len(chunk.tokens), starts_offset, len(starts or b"") // 4)
            )
        assert rows, f"{path} would have no chunk"
        index = pack_index(rows, crcs, first_chunk=first_chunk, token_bytes=DTYPES[dtype].itemsize)
        index_offset = tar.add(INDEX_NAME, index)
        tar.finish()
    return ShardEntry(
        name=path.name,
        bytes=tar.offset,
        sha256=tar.sha256.hexdigest(),
        index_offset=index_offset,
        index_bytes=len(index),
        index_crc32c=stored_crc32c(index),
        chunks=len(rows),
        tokens=sum(row.tokens for row in rows),
    )


class _Tar:
    """A ustar archive that is written member by member; tarfile makes the headers."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.offset
        self._write(data)
        self._pad(tarfile.BLOCKSIZE)
        return offset

    def finish(self) -> None:
        """Write the end of the archive."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._pad(tarfile.RECORDSIZE)

    def _pad(self, multiple: int) -> None:
        self._write(bytes(-self.offset % multiple))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.offset += len(data)


def _tokens(chunk: Chunk, dtype: Dtype) -> bytes:
    tokens = chunk.tokens
    assert tokens.ndim == 1, f"a chunk has shape {tokens.shape}"
    assert len(tokens) >= 2, f"a chunk of {len(tokens)} tokens has no target"
    assert tokens.min() >= 0, f"a negative id: {tokens.min()}"
    assert tokens.max() <= np.iinfo(DTYPES[dtype]).max, (
        f"id {tokens.max()} does not fit into {dtype}"
    )
    return tokens.astype(DTYPES[dtype]).tobytes()


def _starts(chunk: Chunk) -> bytes | None:
    starts = chunk.starts
    if starts is None:
        return None
    edges = np.concatenate(([-1], starts.astype(np.int64), [len(chunk.tokens)]))
    assert (np.diff(edges) > 0).all(), "document starts must ascend inside the chunk"
    return starts.astype("<u4").tobytes()
