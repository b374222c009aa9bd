"""Copies of chunks on a node's own disk: one file per chunk, checked on every read like the corpus itself.

    CACHE_DIR/<corpus fingerprint>/00000017.chunk
        the chunk's tokens | its document starts
        an index (shard_format.py) of this one chunk, with the block CRCs of the shard's index
        u32 bytes of that index | u32 CRC32C at the end of the shard's index (the manifest contains it too)

So a staged chunk needs nothing from the shared file system. The folder's name and the CRC32C of the shard's
index tie it to its shard; against damage, each read checks its blocks. That is not a defence against
forgery: a user who can write here can change what the ranks read. A copy is never needed: a damaged one is
removed, and the corpus is read instead.

The second half of this module manages a cache folder: its lock, its free space, and what a killed stager
left in it.
"""

import errno
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lmscale.base.errors import ConfigError, DataError, LmscaleError, Problem
from lmscale.base.fs import atomic_writer, lock_folder
from lmscale.base.lru import LruCache
from lmscale.corpus.checked_files import ByteRange, Bytes, CheckedFiles
from lmscale.corpus.manifest import Manifest
from lmscale.corpus.shard_format import (
    BLOCK_BYTES,
    ChunkIndex,
    IndexEntry,
    Member,
    pack_index,
    parse_index,
    stored_crc32c,
)

X = TypeVar("X")

SUFFIX = ".chunk"
_FOOTER = struct.Struct("<II")
_CACHED_INDEXES = 1 << 14  # about 1 KB each
_log = logging.getLogger(__name__)


def corpus_cache_folder(cache_dir: Path, manifest: Manifest) -> Path:
    """The folder of the copies of a corpus' chunks, the same for every copy of the corpus."""
    return cache_dir / manifest.fingerprint


def chunk_path(folder: Path, chunk: int) -> Path:
    """The file of one chunk."""
    return folder / f"{chunk:08d}{SUFFIX}"


def trailer(chunk: int, index: ChunkIndex, *, index_crc32c: int) -> bytes:
    """The bytes after the tokens and document starts of a chunk; `index` is that of its shard."""
    tokens, starts = index.tokens(chunk), index.starts(chunk)
    crcs = [*tokens.crcs.tolist(), *(starts.crcs.tolist() if starts else ())]
    row = IndexEntry(
        offset=0,
        tokens=tokens.bytes // index.token_bytes,
        starts_offset=tokens.bytes if starts else 0,
        starts=starts.bytes // 4 if starts else 0,
    )
    chunk_index = pack_index(
        [row],
        crcs,
        first_chunk=chunk,
        token_bytes=index.token_bytes,
        block_bytes=index.block_bytes,
    )
    return chunk_index + _FOOTER.pack(len(chunk_index), index_crc32c)


def trailer_bytes(token_bytes: int) -> int:
    """Bytes of the trailer of a chunk with so many bytes of tokens and one block of document starts."""
    blocks = -(-token_bytes // BLOCK_BYTES) + 1
    return (
        len(pack_index([IndexEntry(0, 0, 0, 0)], [0] * blocks, first_chunk=0, token_bytes=1))
        + _FOOTER.size
    )


class ChunkCache:
    """Reads the copies in a folder. What is wrong with a copy gives None and one warning. One thread at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = CheckedFiles(attempts=2, backoff_s=0)  # two: an open file may be stale
        self._indexes: LruCache[int, ChunkIndex] = LruCache(_CACHED_INDEXES)
        self._skipped: set[int] = set()  # chunks whose copies failed once
        self._warned: set[str] = set()

    def index(self, chunk: int, *, index_crc32c: int) -> ChunkIndex | None:
        """The index of a copy; None where there is none. `index_crc32c`: of the chunk's shard."""
        if (cached := self._indexes.get(chunk)) is not None:
            return cached
        path = chunk_path(self.folder, chunk)
        if chunk in self._skipped or not os.path.exists(path):  # False also without permission
            return None
        index = self._trying(chunk, lambda: self._parsed(path, chunk, index_crc32c))
        if index is not None:
            self._indexes.put(chunk, index)
        return index

    def read(
        self, chunk: int, member: Member, cut: slice | None, *, index_crc32c: int
    ) -> Bytes | None:
        """A part of a copy (`cut` None: all), every block checked. None: the corpus must be read instead."""
        index = self.index(chunk, index_crc32c=index_crc32c)
        if index is None:
            return None
        path, extent = chunk_path(self.folder, chunk), index.member(chunk, member)
        return self._trying(
            chunk,
            lambda: self._files.blocks(
                path, f"copy of chunk {chunk}", extent, block_bytes=index.block_bytes, cut=cut
            ),
        )

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _parsed(self, path: Path, chunk: int, index_crc32c: int) -> ChunkIndex:
        size = path.stat().st_size
        footer = self._files.read(ByteRange(path, "footer", max(0, size - _FOOTER.size), size))
        if len(footer) < _FOOTER.size:
            raise DataError(f"{path} has only {size} bytes")
        length, sealed = _FOOTER.unpack(footer.data)
        stop = size - _FOOTER.size
        if sealed != index_crc32c or length > stop:
            raise DataError(f"{path} is not a copy of this chunk of the corpus")

        def parse(data: Bytes) -> ChunkIndex:
            index = parse_index(data.data, index_crc32c=stored_crc32c(data.tobytes()))
            if (index.first_chunk, index.num_chunks) != (chunk, 1):
                raise ValueError(f"it contains chunk {index.first_chunk}")
            return index

        return self._files.parsed(ByteRange(path, "index", stop - length, stop), parse)

    def _trying(self, chunk: int, read: Callable[[], X]) -> X | None:
        """The result of `read`, or None: then the copy is removed if it is damaged, and not read again."""
        path = chunk_path(self.folder, chunk)
        try:
            return read()
        except (LmscaleError, OSError) as error:
            self._indexes.pop(chunk)
            if not os.path.exists(path):
                self._warn_once(
                    "gone", f"{path} is gone: its chunk is read from the corpus instead"
                )
                return None
            self._skipped.add(chunk)
            if isinstance(error, DataError):
                self._remove(path)
                self._warn_once("damaged", f"{path} was damaged and is removed: its chunk is read from "
                                f"the corpus instead, like any other damaged copy ({_reason(error)})")  # fmt: skip
            else:
                self._warn_once("unreadable", f"{path} cannot be read: its chunk is read from the corpus "
                                f"instead, as will be any other such copy ({_reason(error)})")  # fmt: skip
            return None

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn_once("not removed", f"{path} cannot be removed: {error.strerror or error}")

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _log.warning("data.cache_dir: %s", message)


def _reason(error: Exception) -> str:
    """The fact alone: the next action for a corpus does not apply to a copy."""
    return str(error.__cause__ or error)


_LOCK = ".staging.lock"  # not .lock, which run folders have
_SCRATCH = ".tmp"  # the suffix of the temporary files of base/fs.py
_MARGIN_FRAC, _MAX_MARGIN_BYTES = 0.05, 10 << 30  # of the disk, kept free for logs and checkpoints
# The user has to name another folder or get a permission; other errors are failures of the disk.
_USER_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


@contextmanager
def cache_lock(
    cache_dir: Path, stop: threading.Event, *, say: Callable[[str], None]
) -> Iterator[bool]:
    """Hold the folder's lock: other stagers wait, and then find the copies. False: `stop` was set.

    `say` is called once with a message before the first wait. Raises ConfigError for a folder that cannot
    be created or written to, and OSError for a disk that has become read-only: the run continues without
    copies.
    """
    lock_path = cache_dir / _LOCK

    def on_wait() -> None:
        say(f"another start stages into {cache_dir}: waiting until it is done")

    try:
        lock = lock_folder(lock_path, required=True, stop=stop, on_wait=on_wait)
    except OSError as error:
        became_read_only = error.errno == errno.EROFS and lock_path.exists()
        if became_read_only or error.errno not in _USER_ERRORS:
            raise
        fact = f"{cache_dir}: {error.strerror}"
        hint = "name a folder on the node's own disk that you may write to, or null for none"
        raise ConfigError([Problem("data.cache_dir", fact, hint)]) from error
    with lock:
        yield lock.acquired


def copy_sizes(folder: Path) -> dict[int, int]:
    """Chunk -> bytes of its copy, without copies that a power cut left empty."""
    found: dict[int, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem = entry.name.removesuffix(SUFFIX)
            if stem == entry.name or not stem.isdecimal():
                continue
            try:
                size = entry.stat().st_size
            except FileNotFoundError:  # a reader has just removed a damaged copy
                continue
            if size:
                found[int(stem)] = size
    return found


def free_disk_bytes(folder: Path) -> int:
    """Bytes that may be added to the disk of a folder; a margin of it is kept free."""
    disk = os.statvfs(folder)
    margin = min(_MARGIN_FRAC * disk.f_blocks * disk.f_frsize, _MAX_MARGIN_BYTES)
    return int(disk.f_bavail * disk.f_frsize - margin)


def free_cache_bytes(cache_dir: Path, *, cache_bytes: int | None) -> int:
    """Bytes that may still be added, limited by data.cache_bytes for all corpora in the folder and by the disk."""
    free = free_disk_bytes(cache_dir)
    if cache_bytes is None:
        return free
    return min(free, cache_bytes - _tree_bytes(cache_dir))


def remove_scratch_files(folder: Path) -> None:
    """Remove temporary files of killed stagers. Only while holding the lock."""
    for path in folder.glob(f"*{_SCRATCH}"):
        path.unlink(missing_ok=True)


def write_copy(path: Path, parts: list[memoryview]) -> None:
    """Write a file that appears under its name complete or not at all; not durable. Raises OSError."""
    with atomic_writer(path, durable=False) as file:
        file.writelines(parts)


def _tree_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # removed meanwhile
                continue
    return total
