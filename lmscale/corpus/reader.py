"""Samples by number from a corpus on local disk, every byte checked before it is handed out.

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

from lmscale.corpus.cache import ChunkCache, folder_of
from lmscale.corpus.chunks import Chunks
from lmscale.corpus.feistel import Ints
from lmscale.corpus.files import Files
from lmscale.corpus.index import START_BYTES
from lmscale.corpus.manifest import Manifest
from lmscale.corpus.shard import DTYPES


class Place(NamedTuple):
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


class Reader:
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

        `chunks_in_use` is how many chunks the caller reads from at a time: assign.window_chunks for
        training, 1 for reading in order; None: all of them. `backoff_s` bounds the first wait
        before a failed read is tried again. `cache_dir`: where copies of chunks may lie (staging.py).
        """
        self.path = path
        self.seq_len = seq_len
        self.manifest = Manifest.load(path)
        self.num_samples = self.manifest.num_samples(seq_len)
        self.samples_per_chunk = self.manifest.samples_per_chunk(seq_len)
        self._files = Files(backoff_s=backoff_s)
        self._cache = ChunkCache(folder_of(cache_dir, self.manifest)) if cache_dir else None
        self._chunks = Chunks(path, self.manifest, self._files, cache=self._cache)
        self._memory_bytes = memory_bytes
        self.holds_chunks = memory_needed(self.manifest, chunks_in_use) <= memory_bytes
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()

    @property
    def dtype(self) -> np.dtype[Any]:
        """How the shards store a token."""
        return DTYPES[self.manifest.dtype]

    def row(self, sample: int) -> tuple[Ints, Ints]:
        """The seq_len + 1 tokens of a sample, and where in (0, seq_len] documents start. int64.

        Raises DataError naming shard, chunk, bytes, reason and what to do.
        """
        chunk, begin = self._split(sample)
        stop = begin + self.seq_len + 1
        with self._lock:
            if self.holds_chunks:
                held = self._hold(chunk)
                tokens, starts = held.tokens[begin:stop], held.starts
            else:
                tokens = self._chunks.tokens(chunk, slice(begin, stop))
                starts = self._chunks.starts(chunk)
        first, last = np.searchsorted(starts, (begin + 1, stop))
        return tokens.astype(np.int64), starts[first:last].astype(np.int64) - begin

    def locate(self, sample: int) -> Place:
        """Where a sample's tokens lie. Reads the shard's index, no tokens. Raises DataError."""
        chunk, begin = self._split(sample)
        with self._lock:
            shard, index = self._chunks.stored(chunk)
        width = self.dtype.itemsize
        offset = index.tokens(chunk).offset + begin * width
        return Place(shard, offset, (self.seq_len + 1) * width)

    def close(self) -> None:
        """Close the files and drop what is held."""
        with self._lock:
            self._files.close()
            if self._cache is not None:
                self._cache.close()
            self._held.clear()
            self._held_bytes = 0

    def __enter__(self) -> "Reader":
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
        room = self._memory_bytes - self._chunks.size(chunk)
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
