"""Copies of chunks on a node's own disk: one file a chunk, checked on every read like the corpus itself.

    CACHE_DIR/<corpus fingerprint>/00000017.chunk
        the chunk's tokens | its document starts
        an index (index.py) of this one chunk, with the block CRCs of the shard's index
        u32 bytes of that index | u32 CRC32C that ends the shard's index (the manifest holds it too)

So a chunk that is here needs nothing of the shared file system. What ties it to its shard are the folder's
name and the seal, which the manifest holds; against damage each read checks its blocks. That is no defence
against forgery: whoever may write here may write what the ranks read. A copy is never needed: what is damaged
is removed and read from the corpus instead.

A cache folder as a place: who may fill it, how much it may hold, what a killed stager has left in it.
"""

import errno
import fcntl
import logging
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lmscale.base.errors import ConfigError, DataError, LmscaleError, Problem
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
_KEPT_INDEXES = 1 << 14  # about 1 KB each
_log = logging.getLogger(__name__)


def corpus_cache_folder(cache_dir: Path, manifest: Manifest) -> Path:
    """Where the copies of a corpus' chunks lie, whichever copy of the corpus they come from."""
    return cache_dir / manifest.fingerprint


def chunk_path(folder: Path, chunk: int) -> Path:
    """The file of one chunk."""
    return folder / f"{chunk:08d}{SUFFIX}"


def trailer(chunk: int, index: ChunkIndex, *, index_crc32c: int) -> bytes:
    """What follows the tokens and document starts of a chunk of the shard with this index."""
    tokens, starts = index.tokens(chunk), index.starts(chunk)
    crcs = [*tokens.crcs.tolist(), *(starts.crcs.tolist() if starts else ())]
    row = IndexEntry(
        offset=0,
        tokens=tokens.bytes // index.token_bytes,
        starts_offset=tokens.bytes if starts else 0,
        starts=starts.bytes // 4 if starts else 0,
    )
    own = pack_index(
        [row],
        crcs,
        first_chunk=chunk,
        token_bytes=index.token_bytes,
        block_bytes=index.block_bytes,
    )
    return own + _FOOTER.pack(len(own), index_crc32c)


def trailer_bytes(token_bytes: int) -> int:
    """How long the trailer of a chunk with so many bytes of tokens is, where its document starts fill a block."""
    blocks = -(-token_bytes // BLOCK_BYTES) + 1
    return (
        len(pack_index([IndexEntry(0, 0, 0, 0)], [0] * blocks, first_chunk=0, token_bytes=1))
        + _FOOTER.size
    )


class ChunkCache:
    """Reads what staging has left in a folder; whatever is wrong with it is None, said once. One thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = CheckedFiles(attempts=2, backoff_s=0)  # two: an open file may be a stale one
        self._indexes: OrderedDict[int, ChunkIndex] = OrderedDict()
        self._shunned: set[int] = set()  # that could not be read, and not be proven wrong either
        self._said: set[str] = set()

    def index(self, chunk: int, *, index_crc32c: int) -> ChunkIndex | None:
        """The index of a copy; None where there is none. `seal` ends the index of the chunk's shard."""
        if chunk in self._indexes:
            self._indexes.move_to_end(chunk)
            return self._indexes[chunk]
        path = chunk_path(self.folder, chunk)
        if chunk in self._shunned or not os.path.exists(
            path
        ):  # False also where the folder is closed to us
            return None
        index = self._trying(chunk, lambda: self._parsed(path, chunk, index_crc32c))
        if index is not None:
            self._indexes[chunk] = index
            if len(self._indexes) > _KEPT_INDEXES:
                self._indexes.popitem(last=False)
        return index

    def read(
        self, chunk: int, member: Member, cut: slice | None, *, index_crc32c: int
    ) -> Bytes | None:
        """A piece of a copy (None: all), every block checked; None: read the corpus."""
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
            raise DataError(f"{path} is no copy of this corpus' chunk")

        def fitting(data: Bytes) -> ChunkIndex:
            index = parse_index(data.data, index_crc32c=stored_crc32c(data.tobytes()))
            if (index.first_chunk, index.num_chunks) != (chunk, 1):
                raise ValueError(f"it holds chunk {index.first_chunk}")
            return index

        return self._files.parsed(ByteRange(path, "index", stop - length, stop), fitting)

    def _trying(self, chunk: int, read: Callable[[], X]) -> X | None:
        """What `read` gives, or None: then the copy is removed where it is wrong, and left alone from now on."""
        path = chunk_path(self.folder, chunk)
        try:
            return read()
        except (LmscaleError, OSError) as error:
            self._indexes.pop(chunk, None)
            if not os.path.exists(path):
                self._say("gone", f"{path} is gone: its chunk is read from the corpus instead")
                return None
            self._shunned.add(chunk)
            if isinstance(error, DataError):
                self._remove(path)
                self._say("wrong", f"{path} was damaged and is removed: its chunk is read from the corpus "
                          f"instead, as will be any other damaged copy ({_reason(error)})")  # fmt: skip
            else:
                self._say("unread", f"{path} cannot be read: its chunk is read from the corpus instead, as will "
                          f"be any other such copy ({_reason(error)})")  # fmt: skip
            return None

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._say("stays", f"{path} cannot be removed: {error.strerror or error}")

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _log.warning("data.cache_dir: %s", text)


def _reason(error: Exception) -> str:
    """The fact alone: what a user should do about a corpus is no advice about a copy."""
    return str(error.__cause__ or error)


_LOCK = ".staging.lock"  # not .lock, which a run's folders have
_SCRATCH = ".tmp"
_MARGIN_FRAC, _MOST_MARGIN = 0.05, 10 << 30  # of the disk, kept free for logs and checkpoints
_POLL_S = 0.2
# The user has to name another folder, or be given a permission; anything else is the disk's matter.
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
    """Hold the folder's lock; whoever else stages into it waits, and finds the work done. False: stopped.

    The kernel drops the lock when its holder dies, however it dies. Raises ConfigError for a folder that
    cannot be made or written to, OSError for a disk that has become read-only: the run goes on without it.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        failed = error.errno == errno.EROFS and (cache_dir / _LOCK).exists()
        if failed or error.errno not in _USER_ERRORS:
            raise
        fact = f"{cache_dir}: {error.strerror}"
        hint = "name a folder on the node's own disk that you may write to, or null for none"
        raise ConfigError([Problem("data.cache_dir", fact, hint)]) from error
    try:
        said = False
        while not (locked := _locked(descriptor)) and not stop.is_set():
            if not said:
                say(f"another start stages into {cache_dir}: waiting until it is done")
                said = True
            stop.wait(_POLL_S)
        yield locked
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def copy_sizes(folder: Path) -> dict[int, int]:
    """Chunk -> bytes of its copy; without those that a power cut has left empty."""
    found: dict[int, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem = entry.name.removesuffix(SUFFIX)
            if stem == entry.name or not stem.isdecimal():
                continue
            try:
                size = entry.stat().st_size
            except FileNotFoundError:  # damaged, and a reader has just removed it
                continue
            if size:
                found[int(stem)] = size
    return found


def free_disk_bytes(folder: Path) -> int:
    """Bytes that may be added to the disk of a folder, less what is kept free on it."""
    disk = os.statvfs(folder)
    margin = min(_MARGIN_FRAC * disk.f_blocks * disk.f_frsize, _MOST_MARGIN)
    return int(disk.f_bavail * disk.f_frsize - margin)


def free_cache_bytes(cache_dir: Path, *, cache_bytes: int | None) -> int:
    """Bytes that may still be added: by data.cache_bytes for all corpora in the folder, and by the disk."""
    free = free_disk_bytes(cache_dir)
    if cache_bytes is None:
        return free
    return min(free, cache_bytes - _tree_bytes(cache_dir))


def remove_scratch_files(folder: Path) -> None:
    """Remove what killed stagers have left. Only under the lock."""
    for path in folder.glob(f"*{_SCRATCH}"):
        path.unlink(missing_ok=True)


def write_copy(path: Path, parts: list[memoryview]) -> None:
    """Write a file that appears under its name whole or not at all. Raises OSError, leaving nothing."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}{_SCRATCH}")
    try:
        with open(scratch, "wb", buffering=0) as file:
            for part in parts:
                done = 0
                while done < len(part):
                    done += file.write(part[done:])
        os.rename(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _tree_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total
