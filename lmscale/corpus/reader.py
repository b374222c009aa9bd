"""Samples of a corpus on disk, by number; every byte is checked before it is returned.

`ChunkReader` finds a chunk in its shard, or its copy in the node's cache, and reads parts of it.
`CorpusReader` cuts chunks into samples, in the first of two ways that fits `memory_bytes`:

    whole chunks      chunks stay in memory until newer ones need the space, so each byte is read and
                      checked once; this needs space for all chunks in use at a time (shuffle windows)
    sample by sample  only the blocks of 64 KiB that a sample touches are read and checked: no memory,
                      but up to 64 KiB more per sample
"""

import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmscale.base.closing import Closing
from lmscale.base.lru import LruCache
from lmscale.corpus.checked_files import ByteRange, Bytes, CheckedFiles
from lmscale.corpus.manifest import Manifest
from lmscale.corpus.node_cache import ChunkCache, corpus_cache_folder
from lmscale.corpus.order import Ints
from lmscale.corpus.shard_format import (
    DTYPES,
    START_BYTES,
    ChunkIndex,
    Member,
    chunk_range,
    parse_index,
)

_CACHED_INDEXES = 1024  # about 20 KB each at 256 chunks of 512 KiB per shard


class ChunkReader:
    """Reads parts of chunks, from the node's cache where it has them. One thread at a time."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        files: CheckedFiles,
        *,
        cache: ChunkCache | None = None,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._files = files
        self._cache = cache
        self._dtype: np.dtype[Any] = DTYPES[manifest.dtype]
        self._first_chunks = manifest.first_chunks
        self._indexes: LruCache[int, ChunkIndex] = LruCache(_CACHED_INDEXES)

    def chunks_of_shard(self, shard: int) -> range:
        """The numbers of a shard's chunks."""
        return range(int(self._first_chunks[shard]), int(self._first_chunks[shard + 1]))

    def shard_of(self, chunk: int) -> int:
        """The number of the shard that contains a chunk."""
        assert 0 <= chunk < self._first_chunks[-1], f"chunk {chunk} of {self._first_chunks[-1]}"
        return int(np.searchsorted(self._first_chunks, chunk, side="right")) - 1

    def locate(self, chunk: int) -> tuple[Path, ChunkIndex]:
        """The path of the shard that contains a chunk, and its index, which is read. Raises DataError."""
        shard = self.shard_of(chunk)
        return self._folder / self._manifest.shards[shard].name, self._index(shard)

    def chunk_bytes(self, chunk: int) -> int:
        """Bytes of a chunk's tokens and document starts."""
        cached = (
            self._cache.index(chunk, index_crc32c=self.index_crc32c(chunk)) if self._cache else None
        )
        index = cached or self.locate(chunk)[1]
        starts = index.starts(chunk)
        return index.tokens(chunk).bytes + (starts.bytes if starts else 0)

    def index_crc32c(self, chunk: int) -> int:
        """The CRC32C at the end of the index of a chunk's shard, from the manifest."""
        return self._manifest.shards[self.shard_of(chunk)].index_crc32c

    def tokens(self, chunk: int, part: slice | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """A chunk's tokens, or a part of them, checked. Raises DataError."""
        width = self._dtype.itemsize
        cut = slice(part.start * width, part.stop * width) if part else None
        return self._member(chunk, "tokens", cut).view(self._dtype)

    def starts(self, chunk: int) -> NDArray[np.uint32]:
        """Where documents start inside a chunk, checked. Raises DataError."""
        return self._member(chunk, "starts", None).view("<u4")

    def _member(self, chunk: int, member: Member, cut: slice | None) -> Bytes:
        if self._cache is not None:
            cached = self._cache.read(chunk, member, cut, index_crc32c=self.index_crc32c(chunk))
            if cached is not None:
                return cached
        path, index = self.locate(chunk)
        what = f"chunk {chunk}" if member == "tokens" else f"document starts of chunk {chunk}"
        return self._files.blocks(
            path, what, index.member(chunk, member), block_bytes=index.block_bytes, cut=cut
        )

    def _check_tokens(self, shard: int, index: ChunkIndex) -> None:
        """Only the last chunk of the corpus may be shorter, or samples could not be located by division."""
        manifest = self._manifest
        for chunk, tokens in zip(
            self.chunks_of_shard(shard), index.rows[:, 1].tolist(), strict=True
        ):
            first, stop = chunk_range(
                chunk, tokens=manifest.tokens, chunk_tokens=manifest.chunk_tokens
            )
            if tokens != stop - first:
                raise ValueError(
                    f"chunk {chunk} has {tokens} tokens in the index, {stop - first} in the manifest"
                )

    def _index(self, shard: int) -> ChunkIndex:
        if (cached := self._indexes.get(shard)) is not None:
            return cached
        entry = self._manifest.shards[shard]
        stop = entry.index_offset + entry.index_bytes
        region = ByteRange(self._folder / entry.name, "index", entry.index_offset, stop)

        def parse(data: Bytes) -> ChunkIndex:
            index = parse_index(data.data, index_crc32c=entry.index_crc32c)
            found = index.first_chunk, index.num_chunks, index.token_bytes
            expected = int(self._first_chunks[shard]), entry.chunks, self._dtype.itemsize
            if found != expected:
                raise ValueError(
                    "the index has first chunk {}, {} chunks, {} bytes per token; "
                    "the manifest has {}, {}, {}".format(*found, *expected)
                )
            self._check_tokens(shard, index)
            return index

        index = self._files.parsed(region, parse)
        self._indexes.put(shard, index)
        return index


class SampleLocation(NamedTuple):
    """Where the seq_len + 1 tokens of a sample are stored."""

    shard: Path
    offset: int
    bytes: int


class _Chunk(NamedTuple):
    tokens: NDArray[np.unsignedinteger[Any]]
    starts: NDArray[np.uint32]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.starts.nbytes


class CorpusReader(Closing):
    """One corpus, cut into samples of seq_len targets. Threads may share it; a lock lets one read at a time."""

    def __init__(
        self,
        path: Path,
        *,
        seq_len: int,
        memory_bytes: int,
        chunks_in_use: int | None = None,
        backoff_s: float = 0.2,
        cache_dir: Path | None = None,
    ) -> None:
        """Open a corpus. Raises DataError (missing, damaged) and ConfigError (seq_len).

        `chunks_in_use` is the number of chunks that the caller reads from at a time: order.chunks_in_use
        for training, 1 for reading in order; None: all of them. `backoff_s` bounds the wait before
        a failed read is repeated for the first time. `cache_dir` may contain copies of chunks
        (staging.py).
        """
        self.path = path
        self.seq_len = seq_len
        self.manifest = Manifest.load(path)
        self.num_samples = self.manifest.num_samples(seq_len)
        self.samples_per_chunk = self.manifest.samples_per_chunk(seq_len)
        self._files = CheckedFiles(backoff_s=backoff_s)
        self._cache = (
            ChunkCache(corpus_cache_folder(cache_dir, self.manifest)) if cache_dir else None
        )
        self._chunks = ChunkReader(path, self.manifest, self._files, cache=self._cache)
        self.keeps_chunks = memory_needed(self.manifest, chunks_in_use) <= memory_bytes
        self._memory: LruCache[int, _Chunk] = LruCache(memory_bytes, cost=lambda c: c.nbytes)
        self._lock = threading.Lock()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type in which the shards store a token."""
        return DTYPES[self.manifest.dtype]

    def read_sample(self, sample: int) -> tuple[Ints, Ints]:
        """The seq_len + 1 tokens of a sample, and the offsets in (0, seq_len] at which documents start. int64.

        Raises DataError, which names shard, chunk, bytes, reason and next action.
        """
        chunk, begin = self._split(sample)
        stop = begin + self.seq_len + 1
        with self._lock:
            if self.keeps_chunks:
                whole = self._whole_chunk(chunk)
                tokens, starts = whole.tokens[begin:stop], whole.starts
            else:
                tokens = self._chunks.tokens(chunk, slice(begin, stop))
                starts = self._chunks.starts(chunk)
        first, last = np.searchsorted(starts, (begin + 1, stop))
        return tokens.astype(np.int64), starts[first:last].astype(np.int64) - begin

    def locate(self, sample: int) -> SampleLocation:
        """Where a sample's tokens are stored. Reads the shard's index, no tokens. Raises DataError."""
        chunk, begin = self._split(sample)
        with self._lock:
            shard, index = self._chunks.locate(chunk)
        width = self.dtype.itemsize
        offset = index.tokens(chunk).offset + begin * width
        return SampleLocation(shard, offset, (self.seq_len + 1) * width)

    def close(self) -> None:
        """Close the files and drop the chunks in memory."""
        with self._lock:
            self._files.close()
            if self._cache is not None:
                self._cache.close()
            self._memory.clear()

    def _split(self, sample: int) -> tuple[int, int]:
        """The chunk of a sample and the offset of its first token in it."""
        assert 0 <= sample < self.num_samples, f"sample {sample} of {self.num_samples}"
        chunk, row = divmod(sample, self.samples_per_chunk)
        return chunk, row * self.seq_len

    def _whole_chunk(self, chunk: int) -> _Chunk:
        if (cached := self._memory.get(chunk)) is not None:
            return cached
        self._memory.make_room(self._chunks.chunk_bytes(chunk))  # before reading: bounds the memory
        whole = _Chunk(self._chunks.tokens(chunk), self._chunks.starts(chunk))
        self._memory.put(chunk, whole)
        return whole


def memory_needed(manifest: Manifest, chunks_in_use: int | None = None) -> int:
    """Bytes of so many whole chunks (None: all of the corpus) with their document starts."""
    chunks = manifest.num_chunks
    in_use = chunks if chunks_in_use is None else min(chunks_in_use, chunks)
    starts = manifest.documents + chunks  # a start on a boundary is listed in both chunks
    return in_use * manifest.chunk_bytes + -(-in_use * starts // max(1, chunks)) * START_BYTES
