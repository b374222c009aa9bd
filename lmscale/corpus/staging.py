"""Fill a node's cache with the chunks that it reads next, checked, until its space is used.

Copies appear by rename, complete or not at all; a killed stager leaves at most temporary files, which the
next one removes. Nothing is synced: after a power cut a copy may be torn, which its block CRCs show.
"""

import errno
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lmscale.base.closing import Closing
from lmscale.corpus.checked_files import CheckedFiles
from lmscale.corpus.manifest import Manifest
from lmscale.corpus.node_cache import (
    chunk_path,
    copy_sizes,
    corpus_cache_folder,
    free_cache_bytes,
    free_disk_bytes,
    remove_scratch_files,
    trailer,
    trailer_bytes,
    write_copy,
)
from lmscale.corpus.order import Ints
from lmscale.corpus.reader import ChunkReader
from lmscale.corpus.shard_format import START_BYTES

_POLL_S = 0.1
_JOIN_S = 2.0  # a thread that hangs in a read of a dead file system ends with the process

Work = Callable[[int], bool]  # False: nothing more can be done, which is not an error
Tick = Callable[[], None]


class StagingPool(Closing):
    """Threads that process lists of items, one list at a time each. Leaving the context ends them."""

    def __init__(self, worker: Callable[[], Work], stop: threading.Event, *, threads: int) -> None:
        """`worker` is called once in each thread, to make what threads must not share."""
        self._worker = worker
        self._stop = stop
        self._ended = threading.Event()
        self._errors: list[BaseException] = []
        self._queue: queue.Queue[list[int] | None] = queue.Queue(maxsize=2 * threads)
        self._threads = [
            threading.Thread(target=self._run, name=f"stage-{number}", daemon=True)
            for number in range(threads)
        ]

    def work(self, lists: Iterable[list[int]], tick: Tick) -> None:
        """Process the lists until all are done, a thread fails or `stop` is set; `tick` is called often.

        Raises the exception of a thread.
        """
        for items in itertools.chain(lists, [None] * len(self._threads)):
            while not self._over():
                tick()
                try:
                    self._queue.put(items, timeout=_POLL_S)
                    break
                except queue.Full:
                    continue
            if self._over():
                break
        while not self._over() and any(thread.is_alive() for thread in self._threads):
            tick()
            for thread in self._threads:
                thread.join(_POLL_S / len(self._threads))
        if self._errors:
            raise self._errors[0]
        tick()

    def _over(self) -> bool:
        return self._stop.is_set() or self._ended.is_set()

    def _run(self) -> None:
        try:
            work = self._worker()
            while not self._over():
                try:
                    items = self._queue.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if items is None:
                    return
                for item in items:
                    if self._over():
                        return
                    if not work(item):
                        self._ended.set()
        except BaseException as error:  # the caller raises it
            self._errors.append(error)
            self._ended.set()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        """Stop the threads and wait for them for a moment."""
        self._ended.set()
        for thread in self._threads:
            thread.join(_JOIN_S / len(self._threads))


THREADS = 3  # one waits for the shared file system while one checks and one writes
_BATCH = 512  # chunks distributed together, grouped by shard
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Progress = Callable[[int, int], None]  # bytes staged, bytes to stage in all


@dataclass(slots=True)
class StagingResult:
    """The result of staging so far."""

    wanted: int = 0  # chunks that are read next and fit
    present: int = 0  # of those already in the cache
    copied: int = 0
    copied_bytes: int = 0
    evicted: int = 0
    all_fit: bool = True  # False: the run reads more chunks than fit
    stopped_by: str = ""  # why copying ended early: a full or failing disk


class Stager:
    """Copies chunks of one corpus into a cache folder. The caller holds node_cache.cache_lock."""

    def __init__(
        self, corpus: Path, manifest: Manifest, cache_dir: Path, *, cache_bytes: int | None
    ) -> None:
        self._corpus = corpus
        self._manifest = manifest
        self._folder = corpus_cache_folder(cache_dir, manifest)
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_scratch_files(self._folder)
        self._sizes = copy_sizes(self._folder)
        self._used = sum(self._sizes.values())
        self._capacity = self._used + free_cache_bytes(cache_dir, cache_bytes=cache_bytes)
        self._evictable: list[int] = []
        self._lock = threading.Lock()  # for the counters
        self.staged = StagingResult()

    def stage(
        self, blocks: Iterable[Ints], *, max_chunks: int, stop: threading.Event, progress: Progress
    ) -> StagingResult:
        """Copy the chunks of `blocks`, in that order, until the space is used or `stop` is set.

        `max_chunks`: distinct chunks that the blocks can name. Raises DataError and RetryableError as
        reading the corpus does; whatever is wrong with the cache only ends the copying.
        """
        wanted = self._choose(blocks, max_chunks, stop)
        present = np.fromiter(self._sizes, dtype=np.int64, count=len(self._sizes))
        missing = wanted[~np.isin(wanted, present)]
        by_age = sorted(set(self._sizes) - set(wanted.tolist()), key=self._age, reverse=True)
        self._evictable = by_age  # the oldest is last, where pop takes it
        self.staged.wanted = len(wanted)
        self.staged.present = len(wanted) - len(missing)
        while self._used > self._capacity and self._evict_one():  # the limit may have been lowered
            pass
        self._copy_all(missing, stop, progress)
        return self.staged

    def _choose(self, blocks: Iterable[Ints], max_chunks: int, stop: threading.Event) -> Ints:
        """The first chunks of the blocks that fit, each once."""
        seen: NDArray[np.bool_] = np.zeros(self._manifest.num_chunks, dtype=bool)
        typical = self._typical_bytes()
        chosen: list[Ints] = []
        count, total = 0, 0
        for block in blocks:
            new = block[~seen[block]]
            seen[new] = True
            sizes = np.array(
                [self._sizes.get(chunk, typical) for chunk in new.tolist()], dtype=np.int64
            )
            fitting = int(np.searchsorted(total + np.cumsum(sizes), self._capacity, side="right"))
            chosen.append(new[:fitting])
            count += fitting
            total += int(sizes[:fitting].sum())
            if fitting < len(new):
                self.staged.all_fit = False
            if fitting < len(new) or count >= max_chunks or stop.is_set():
                break
        return np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)

    def _typical_bytes(self) -> int:
        """Typical bytes of a copy; only the number of document starts varies."""
        manifest = self._manifest
        starts = manifest.documents * START_BYTES // max(1, manifest.num_chunks)
        return manifest.chunk_bytes + starts + trailer_bytes(manifest.chunk_bytes)

    def _copy_all(self, missing: Ints, stop: threading.Event, progress: Progress) -> None:
        total = len(missing) * self._typical_bytes()
        with StagingPool(self._copier, stop, threads=THREADS) as pool:
            pool.work(self._by_shard(missing), lambda: progress(self.staged.copied_bytes, total))

    def _by_shard(self, missing: Ints) -> Iterator[list[int]]:
        """Chunks roughly in order of first use; those of a shard together, which reads faster."""
        chunks = ChunkReader(self._corpus, self._manifest, CheckedFiles())  # shard_of does not read
        for begin in range(0, len(missing), _BATCH):
            batch = sorted(missing[begin : begin + _BATCH].tolist())
            for _, shard in itertools.groupby(batch, chunks.shard_of):
                yield list(shard)

    def _copier(self) -> Work:
        """The function with which one thread copies a chunk."""
        files = CheckedFiles()
        chunks = ChunkReader(self._corpus, self._manifest, files)

        def copy(chunk: int) -> bool:
            parts = [memoryview(chunks.tokens(chunk).data).cast("B")]
            parts.append(memoryview(chunks.starts(chunk).data).cast("B"))
            _, index = chunks.locate(chunk)
            end = trailer(chunk, index, index_crc32c=chunks.index_crc32c(chunk))
            return self._keep(chunk, [*parts, memoryview(end)])

        return copy

    def _keep(self, chunk: int, parts: list[memoryview]) -> bool:
        size, path = sum(part.nbytes for part in parts), chunk_path(self._folder, chunk)
        while self._reserve(size):
            try:
                if (
                    free_disk_bytes(self._folder) < size
                ):  # others write to this disk too, for instance checkpoints
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                write_copy(path, parts)
            except OSError as error:
                self._release(size)
                full = error.errno in _FULL
                if full and self._evict_one():
                    continue
                what = "its disk is full" if full else f"{path}: {error.strerror or error}"
                self.staged.stopped_by = self.staged.stopped_by or what
                return False
            with self._lock:
                self._sizes[chunk] = size
                self.staged.copied += 1
                self.staged.copied_bytes += size
            return True
        return False

    def _reserve(self, size: int) -> bool:
        """Reserve space for a copy; old copies are removed where that is needed."""
        while True:
            with self._lock:
                if self._used + size <= self._capacity:
                    self._used += size
                    return True
            if not self._evict_one():
                self.staged.all_fit = False
                return False

    def _release(self, size: int) -> None:
        with self._lock:
            self._used -= size

    def _evict_one(self) -> bool:
        with self._lock:
            if not self._evictable:
                return False
            chunk = self._evictable.pop()
            try:
                chunk_path(self._folder, chunk).unlink(missing_ok=True)
            except OSError:  # for instance of another user: it stays, and stays counted
                return bool(self._evictable)
            self._used -= self._sizes.pop(chunk)
            self.staged.evicted += 1
            return True

    def _age(self, chunk: int) -> float:
        try:
            return chunk_path(self._folder, chunk).stat().st_mtime
        except OSError:
            return 0.0
