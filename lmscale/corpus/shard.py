"""Writing one shard: a plain tar of chunks that ends with their index.

The bytes are a function of the chunks alone (no time, no user, no mode of the writer), so that any
number of workers, killed and started again, writes the same corpus.

    00000017.u16        chunk_tokens + 1 raw little-endian tokens; the last is the first of chunk 18
    00000017.docs.u32   where documents start inside the chunk (optional)
    ...
    __lmidx__           index.py
"""

import hashlib
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmscale.corpus.index import INDEX_NAME, Row, block_crcs, pack, seal_of
from lmscale.corpus.publish import published

Dtype = Literal["u16", "u32"]
DTYPES: dict[Dtype, np.dtype[Any]] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}


class Chunk(NamedTuple):
    """One chunk as prepare hands it over."""

    tokens: NDArray[np.integer[Any]]  # [chunk_tokens + 1], the corpus' last chunk may be shorter
    starts: NDArray[np.integer[Any]] | None  # ascending, in [0, len(tokens)); None: no such list


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the manifest says of one shard."""

    name: str  # file name inside the corpus folder
    bytes: int
    sha256: str  # of the whole file
    index_offset: int  # of the index' bytes in the file
    index_bytes: int
    index_crc32c: int  # binds the block CRCs to the manifest: another corpus' shard is not taken
    chunks: int
    tokens: int  # stored; neighbouring chunks share one


def dtype_for(vocab_size: int) -> Dtype:
    """The narrowest dtype that holds every id of a vocabulary."""
    return "u16" if vocab_size <= 1 << 16 else "u32"


def shard_name(number: int) -> str:
    """File name of a corpus' shard."""
    return f"shard-{number:06d}.tar"


def num_chunks(tokens: int, chunk_tokens: int) -> int:
    """Chunks that hold a stream of so many tokens."""
    return max(0, -(-(tokens - 1) // chunk_tokens))


def chunk_range(chunk: int, *, tokens: int, chunk_tokens: int) -> tuple[int, int]:
    """The tokens [first, stop) of the stream that a chunk stores; the last is the next one's first.

    A document that starts at that last token belongs to the `starts` of both chunks: the row that
    ends with it has to know that its last target is another document's.
    """
    first = chunk * chunk_tokens
    return first, min(first + chunk_tokens + 1, tokens)


def write_shard(
    path: Path, chunks: Iterable[Chunk], *, first_chunk: int, dtype: Dtype
) -> ShardEntry:
    """Write chunks `first_chunk`, `first_chunk` + 1, ... to a tar that appears whole or not at all.

    Holds one chunk in memory at a time. Raises RetryableError where the file system refuses, for
    instance because it is full.
    """
    rows: list[Row] = []
    crcs: list[int] = []
    with published(path) as file:
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
            rows.append(Row(offset, len(chunk.tokens), starts_offset, len(starts or b"") // 4))
        assert rows, f"{path} would have no chunk"
        index = pack(rows, crcs, first_chunk=first_chunk, token_bytes=DTYPES[dtype].itemsize)
        index_offset = tar.add(INDEX_NAME, index)
        tar.end()
    return ShardEntry(
        name=path.name,
        bytes=tar.offset,
        sha256=tar.sha256.hexdigest(),
        index_offset=index_offset,
        index_bytes=len(index),
        index_crc32c=seal_of(index),
        chunks=len(rows),
        tokens=sum(row.tokens for row in rows),
    )


class _Tar:
    """A ustar archive written member by member; tarfile makes the headers."""

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

    def end(self) -> None:
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
    assert tokens.ndim == 1, f"a chunk of shape {tokens.shape}"
    assert len(tokens) >= 2, f"a chunk of {len(tokens)} tokens has no target"
    assert tokens.min() >= 0, f"an id of {tokens.min()}"
    assert tokens.max() <= np.iinfo(DTYPES[dtype]).max, f"id {tokens.max()} in {dtype}"
    return tokens.astype(DTYPES[dtype]).tobytes()


def _starts(chunk: Chunk) -> bytes | None:
    starts = chunk.starts
    if starts is None:
        return None
    edges = np.concatenate(([-1], starts.astype(np.int64), [len(chunk.tokens)]))
    assert (np.diff(edges) > 0).all(), "document starts must ascend inside the chunk"
    return starts.astype("<u4").tobytes()
