"""The one place where files of a corpus are read: ranges, each checked block by block before use.

A corpus on disk, chunk by chunk: which shard holds it, where, and its bytes once they are checked.

Samples by number from a corpus on local disk, every byte checked before it is handed out.

Two ways to read, of which the reader takes the first that fits `memory_bytes`:
    held    whole chunks stay in memory until newer ones need the room: each byte is read and checked
            once; needs room for all chunks that are in use at a time (the shuffle windows)
    by row  each sample's blocks of 64 KiB are read and checked alone: no memory, up to 64 KiB a row
"""

import threading
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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

_KEPT_INDEXES = 1024  # about 20 KB each at 256 chunks of 512 KiB a shard


class ChunkReader:
    """Reads pieces of chunks, from the node's cache where they are. One thread at a time."""

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
        self._indexes: OrderedDict[int, ChunkIndex] = OrderedDict()

    def chunks_of_shard(self, shard: int) -> range:
        """The numbers of a shard's chunks."""
        return range(int(self._first_chunks[shard]), int(self._first_chunks[shard + 1]))

    def shard_of(self, chunk: int) -> int:
        """The number of the shard that holds a chunk."""
        assert 0 <= chunk < self._first_chunks[-1], f"chunk {chunk} of {self._first_chunks[-1]}"
        return int(np.searchsorted(self._first_chunks, chunk, side="right")) - 1

    def locate(self, chunk: int) -> tuple[Path, ChunkIndex]:
        """The shard that holds a chunk. Reads its index. Raises DataError."""
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
        """The CRC32C that ends the index of a chunk's shard, by the manifest."""
        return self._manifest.shards[self.shard_of(chunk)].index_crc32c

    def tokens(self, chunk: int, piece: slice | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """A chunk's tokens, or a piece of them, checked. Raises DataError."""
        width = self._dtype.itemsize
        cut = slice(piece.start * width, piece.stop * width) if piece else None
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
        """Only the corpus' last chunk may be shorter: samples are found by that."""
        manifest = self._manifest
        for chunk, tokens in zip(
            self.chunks_of_shard(shard), index.rows[:, 1].tolist(), strict=True
        ):
            first, stop = chunk_range(
                chunk, tokens=manifest.tokens, chunk_tokens=manifest.chunk_tokens
            )
            if tokens != stop - first:
                raise ValueError(
                    f"the index says {tokens} tokens in chunk {chunk}, the manifest {stop - first}"
                )

    def _index(self, shard: int) -> ChunkIndex:
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
            return self._indexes[shard]
        entry = self._manifest.shards[shard]
        stop = entry.index_offset + entry.index_bytes
        region = ByteRange(self._folder / entry.name, "index", entry.index_offset, stop)

        def fitting(data: Bytes) -> ChunkIndex:
            index = parse_index(data.data, index_crc32c=entry.index_crc32c)
            found = index.first_chunk, index.num_chunks, index.token_bytes
            want = int(self._first_chunks[shard]), entry.chunks, self._dtype.itemsize
            if found != want:
                raise ValueError(
                    "the index says first chunk {}, {} chunks, {} bytes a token; "
                    "the manifest {}, {}, {}".format(*found, *want)
                )
            self._check_tokens(shard, index)
            return index

        index = self._indexes[shard] = self._files.parsed(region, fitting)
        if len(self._indexes) > _KEPT_INDEXES:
            self._indexes.popitem(last=False)
        return index


class SampleLocation(NamedTuple):
    """Where the seq_len + 1 tokens of a sample lie."""

    shard: Path
    offset: int
    bytes: int


class _Held(NamedTuple):
    tokens: NDArray[np.unsignedinteger[Any]]
    starts: NDArray[np.uint32]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.starts.nbytes


class CorpusReader:
    """One corpus, cut into samples of seq_len targets. Threads may share it; they take turns."""

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

        `chunks_in_use` is how many chunks the caller reads from at a time: order.chunks_in_use for
        training, 1 for reading in order; None: all of them. `backoff_s` bounds the first wait
        before a failed read is tried again. `cache_dir`: where copies of chunks may lie (staging.py).
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
        self._memory_bytes = memory_bytes
        self.keeps_chunks = memory_needed(self.manifest, chunks_in_use) <= memory_bytes
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()

    @property
    def dtype(self) -> np.dtype[Any]:
        """How the shards store a token."""
        return DTYPES[self.manifest.dtype]

    def read_sample(self, sample: int) -> tuple[Ints, Ints]:
        """The seq_len + 1 tokens of a sample, and where in (0, seq_len] documents start. int64.

        Raises DataError naming shard, chunk, bytes, reason and what to do.
        """
        chunk, begin = self._split(sample)
        stop = begin + self.seq_len + 1
        with self._lock:
            if self.keeps_chunks:
                held = self._hold(chunk)
                tokens, starts = held.tokens[begin:stop], held.starts
            else:
                tokens = self._chunks.tokens(chunk, slice(begin, stop))
                starts = self._chunks.starts(chunk)
        first, last = np.searchsorted(starts, (begin + 1, stop))
        return tokens.astype(np.int64), starts[first:last].astype(np.int64) - begin

    def locate(self, sample: int) -> SampleLocation:
        """Where a sample's tokens lie. Reads the shard's index, no tokens. Raises DataError."""
        chunk, begin = self._split(sample)
        with self._lock:
            shard, index = self._chunks.locate(chunk)
        width = self.dtype.itemsize
        offset = index.tokens(chunk).offset + begin * width
        return SampleLocation(shard, offset, (self.seq_len + 1) * width)

    def close(self) -> None:
        """Close the files and drop what is held."""
        with self._lock:
            self._files.close()
            if self._cache is not None:
                self._cache.close()
            self._held.clear()
            self._held_bytes = 0

    def __enter__(self) -> "CorpusReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _split(self, sample: int) -> tuple[int, int]:
        """Chunk and first token inside it."""
        assert 0 <= sample < self.num_samples, f"sample {sample} of {self.num_samples}"
        chunk, row = divmod(sample, self.samples_per_chunk)
        return chunk, row * self.seq_len

    def _hold(self, chunk: int) -> _Held:
        if chunk in self._held:
            self._held.move_to_end(chunk)
            return self._held[chunk]
        room = self._memory_bytes - self._chunks.chunk_bytes(chunk)
        while self._held and self._held_bytes > room:
            self._held_bytes -= self._held.popitem(last=False)[1].nbytes
        held = _Held(self._chunks.tokens(chunk), self._chunks.starts(chunk))
        if held.nbytes <= self._memory_bytes:
            self._held[chunk] = held
            self._held_bytes += held.nbytes
        return held


def memory_needed(manifest: Manifest, chunks_in_use: int | None = None) -> int:
    """Bytes that hold so many whole chunks (None: all of the corpus) and their document starts."""
    chunks = manifest.num_chunks
    in_use = chunks if chunks_in_use is None else min(chunks_in_use, chunks)
    starts = manifest.documents + chunks  # one that starts on a boundary is listed in both chunks
    return in_use * manifest.chunk_bytes + -(-in_use * starts // max(1, chunks)) * START_BYTES
