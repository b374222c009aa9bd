"""A corpus on disk, chunk by chunk: which shard holds it, where, and its bytes once they are checked."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.corpus.cache import ChunkCache
from lmscale.corpus.files import Bytes, Files, Region
from lmscale.corpus.index import Index, Member, parse
from lmscale.corpus.manifest import Manifest
from lmscale.corpus.shard import DTYPES, chunk_range

_KEPT_INDEXES = 1024  # about 20 KB each at 256 chunks of 512 KiB a shard


class Chunks:
    """Reads pieces of chunks, from the node's cache where they are. One thread at a time."""

    def __init__(
        self, folder: Path, manifest: Manifest, files: Files, *, cache: ChunkCache | None = None
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._files = files
        self._cache = cache
        self._dtype: np.dtype[Any] = DTYPES[manifest.dtype]
        self._firsts = manifest.firsts
        self._indexes: OrderedDict[int, Index] = OrderedDict()

    def of_shard(self, shard: int) -> range:
        """The numbers of a shard's chunks."""
        return range(int(self._firsts[shard]), int(self._firsts[shard + 1]))

    def shard_of(self, chunk: int) -> int:
        """The number of the shard that holds a chunk."""
        assert 0 <= chunk < self._firsts[-1], f"chunk {chunk} of {self._firsts[-1]}"
        return int(np.searchsorted(self._firsts, chunk, side="right")) - 1

    def stored(self, chunk: int) -> tuple[Path, Index]:
        """The shard that holds a chunk. Reads its index. Raises DataError."""
        shard = self.shard_of(chunk)
        return self._folder / self._manifest.shards[shard].name, self._index(shard)

    def size(self, chunk: int) -> int:
        """Bytes of a chunk's tokens and document starts."""
        cached = self._cache.index(chunk, seal=self.seal_of(chunk)) if self._cache else None
        index = cached or self.stored(chunk)[1]
        starts = index.starts(chunk)
        return index.tokens(chunk).bytes + (starts.bytes if starts else 0)

    def seal_of(self, chunk: int) -> int:
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
            cached = self._cache.read(chunk, member, cut, seal=self.seal_of(chunk))
            if cached is not None:
                return cached
        path, index = self.stored(chunk)
        what = f"chunk {chunk}" if member == "tokens" else f"document starts of chunk {chunk}"
        return self._files.blocks(
            path, what, index.member(chunk, member), block_bytes=index.block_bytes, cut=cut
        )

    def _check_tokens(self, shard: int, index: Index) -> None:
        """Only the corpus' last chunk may be shorter: samples are found by that."""
        manifest = self._manifest
        for chunk, tokens in zip(self.of_shard(shard), index.rows[:, 1].tolist(), strict=True):
            first, stop = chunk_range(
                chunk, tokens=manifest.tokens, chunk_tokens=manifest.chunk_tokens
            )
            if tokens != stop - first:
                raise ValueError(
                    f"the index says {tokens} tokens in chunk {chunk}, the manifest {stop - first}"
                )

    def _index(self, shard: int) -> Index:
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
            return self._indexes[shard]
        entry = self._manifest.shards[shard]
        stop = entry.index_offset + entry.index_bytes
        region = Region(self._folder / entry.name, "index", entry.index_offset, stop)

        def fitting(data: Bytes) -> Index:
            index = parse(data.data, seal=entry.index_crc32c)
            found = index.first_chunk, index.num_chunks, index.token_bytes
            want = int(self._firsts[shard]), entry.chunks, self._dtype.itemsize
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
