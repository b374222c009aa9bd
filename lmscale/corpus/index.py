"""The last member of a shard, `__lmidx__`: where each chunk lies, and a CRC32C a block of it.

All integers are little-endian:

    "LMIDX" and version 1 as 8 bytes | u32 bytes of a token | u32 bytes of a block
    u64 first chunk | u64 chunks
    a row a chunk: u64 offset of its tokens in the tar, u64 tokens, u64 offset of its document
        starts, u64 starts
    u32 CRC32C a block: of chunk 0's tokens, of its starts, of chunk 1's tokens, ...
    u32 CRC32C of everything before

A member's first block starts with its first byte and only its last block is shorter, so a row can
be checked without the rest of its chunk. A chunk without a list of document starts has offset 0.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import crc32c
import numpy as np
from numpy.typing import NDArray

INDEX_NAME = "__lmidx__"  # webdataset skips members named __*__
BLOCK_BYTES = 65_536
START_BYTES = 4  # a document start is a u32

Member = Literal["tokens", "starts"]

_MAGIC = b"LMIDX\0\0\1"
_HEADER = struct.Struct("<8sIIQQ")
_CRC = struct.Struct("<I")


class Extent(NamedTuple):
    """A member's bytes inside its tar, and the CRC32C of each of its blocks."""

    offset: int
    bytes: int
    crcs: NDArray[np.uint32]


class Row(NamedTuple):
    """What the index says of one chunk."""

    offset: int  # of its tokens, in the tar
    tokens: int
    starts_offset: int  # of its document starts, in the tar; 0 = the chunk has no such list
    starts: int


@dataclass(frozen=True, slots=True)
class Index:
    """The chunks of one shard. Chunk numbers are those of the corpus."""

    first_chunk: int
    token_bytes: int  # 2 | 4
    block_bytes: int
    rows: NDArray[np.int64]  # [chunks, 4], columns as Row
    crcs: NDArray[np.uint32]
    firsts: NDArray[np.int64]  # [2 * chunks + 1]: where each member's CRCs begin in crcs

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
        """The document starts of a chunk of the corpus; None where it has no such list."""
        row = self._row(chunk)
        if not row.starts_offset:
            return None
        which = 2 * (chunk - self.first_chunk) + 1
        return self._extent(which, row.starts_offset, row.starts * START_BYTES)

    def member(self, chunk: int, member: Member) -> Extent:
        """Either of them; a list of document starts that is missing is empty."""
        found = self.tokens(chunk) if member == "tokens" else self.starts(chunk)
        return found or Extent(0, 0, self.crcs[:0])

    def _row(self, chunk: int) -> Row:
        return Row(*(int(value) for value in self.rows[chunk - self.first_chunk]))

    def _extent(self, member: int, offset: int, size: int) -> Extent:
        return Extent(offset, size, self.crcs[self.firsts[member] : self.firsts[member + 1]])


def block_crcs(data: bytes | memoryview) -> list[int]:
    """CRC32C of each block of a member."""
    view = memoryview(data)
    return [
        crc32c.crc32c(view[start : start + BLOCK_BYTES])
        for start in range(0, len(view), BLOCK_BYTES)
    ]


def pack(
    rows: Sequence[Row],
    crcs: Sequence[int],
    *,
    first_chunk: int,
    token_bytes: int,
    block_bytes: int = BLOCK_BYTES,
) -> bytes:
    """The bytes of an index."""
    body = b"".join(
        (
            _HEADER.pack(_MAGIC, token_bytes, block_bytes, first_chunk, len(rows)),
            np.array(rows, dtype="<u8").tobytes(),
            np.array(crcs, dtype="<u4").tobytes(),
        )
    )
    return body + _CRC.pack(crc32c.crc32c(body))


def seal_of(data: bytes) -> int:
    """The CRC32C that ends an index."""
    return int.from_bytes(data[-_CRC.size :], "little")


def parse(data: bytes | memoryview, *, seal: int) -> Index:
    """Read an index that ends with the CRC32C `seal`. Raises ValueError with the reason."""
    view = memoryview(data)
    if len(view) < _HEADER.size + _CRC.size:
        raise ValueError(f"the index has only {len(view)} bytes")
    body = view[: -_CRC.size]
    found = crc32c.crc32c(body), *_CRC.unpack(view[-_CRC.size :])
    if found != (seal, seal):
        raise ValueError(f"the index has CRC32C {found[0]:08x}, expected {seal:08x}")
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
    return Index(first_chunk, token_bytes, block_bytes, rows, crcs, firsts)
