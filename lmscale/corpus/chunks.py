"""A corpus on disk, chunk by chunk: which shard holds it, where, and its bytes once they are checked."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.corpus.files import Bytes, Files, Region
from lmscale.corpus.index import Index, parse
from lmscale.corpus.manifest import Manifest
from lmscale.corpus.shard import DTYPES

_KEPT_INDEXES = 1024  # about 20 KB each at 256 chunks of 512 KiB a shard


class Chunks:
    """Reads pieces of chunks. One thread at a time."""

    def __init__(self, folder: Path, manifest: Manifest, files: Files) -> None:
        self._folder = folder
        self._manifest = manifest
        self._files = files
        self._dtype: np.dtype[Any] = DTYPES[manifest.dtype]
        self._firsts = np.cumsum([0] + [shard.chunks for shard in manifest.shards])
        self._indexes: OrderedDict[int, Index] = OrderedDict()

    def of_shard(self, shard: int) -> range:
        """The numbers of a shard's chunks."""
        return range(int(self._firsts[shard]), int(self._firsts[shard + 1]))

    def stored(self, chunk: int) -> tuple[Path, Index]:
        """The shard that holds a chunk. Reads its index. Raises DataError."""
        assert 0 <= chunk < self._firsts[-1], f"chunk {chunk} of {self._firsts[-1]}"
        shard = int(np.searchsorted(self._firsts, chunk, side="right")) - 1
        return self._folder / self._manifest.shards[shard].name, self._index(shard)

    def size(self, chunk: int) -> int:
        """Bytes of a chunk's tokens and document starts."""
        _, index = self.stored(chunk)
        starts = index.starts(chunk)
        return index.tokens(chunk).bytes + (starts.bytes if starts else 0)

    def tokens(self, chunk: int, piece: slice | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """A chunk's tokens, or a piece of them, checked. Raises DataError."""
        path, index = self.stored(chunk)
        extent, width = index.tokens(chunk), self._dtype.itemsize
        cut = slice(piece.start * width, piece.stop * width) if piece else slice(0, extent.bytes)
        data = self._files.blocks(
            path, f"chunk {chunk}", extent, block_bytes=index.block_bytes, cut=cut
        )
        return data.view(self._dtype)

    def starts(self, chunk: int) -> NDArray[np.uint32]:
        """Where documents start inside a chunk, checked. Raises DataError."""
        path, index = self.stored(chunk)
        extent = index.starts(chunk)
        if extent is None or not extent.bytes:
            return np.empty(0, dtype=np.uint32)
        data = self._files.blocks(
            path,
            f"document starts of chunk {chunk}",
            extent,
            block_bytes=index.block_bytes,
            cut=slice(0, extent.bytes),
        )
        return data.view("<u4")

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
            return index

        index = self._indexes[shard] = self._files.parsed(region, fitting)
        if len(self._indexes) > _KEPT_INDEXES:
            self._indexes.popitem(last=False)
        return index
