"""The one place where files of a corpus are read: ranges, each checked block by block before use."""

import errno
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import crc32c
import numpy as np
from numpy.typing import NDArray

from lmscale.base.errors import DataError, RetryableError
from lmscale.corpus.shard_format import (
    Extent,
)

Bytes = NDArray[np.uint8]


X = TypeVar("X")


_ATTEMPTS = 3


_TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENOTCONN, errno.ECONNRESET, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip


class ByteRange(NamedTuple):
    """A range of one file, and what to call it in an error."""

    path: Path
    what: str  # e.g. "chunk 17"
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.path} {self.what} (bytes {self.start}-{self.stop})"


class CheckedFiles:
    """Range reads with a bounded number of open files.

    A read that the system refuses for a moment, or whose bytes are wrong, is tried again with exponential
    backoff and full jitter: a cold cache of a network file system has been seen to serve both. What stays
    wrong is DataError; what stays refused (EIO, ESTALE, a timeout) proves nothing and is RetryableError.
    """

    def __init__(
        self, *, max_open: int = 64, backoff_s: float = 0.2, attempts: int = _ATTEMPTS
    ) -> None:
        self._max_open = max_open
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._jitter = random.Random()  # of waiting times only, never of data

    def read(self, region: ByteRange) -> Bytes:
        """The bytes of a region, without any check but their number."""
        return self._persistently(region, lambda: self._pread(region))

    def parsed(self, region: ByteRange, parse: Callable[[Bytes], X]) -> X:
        """What `parse` makes of a region; its ValueError is damage and tells the reason."""
        return self._persistently(region, lambda: parse(self._pread(region)))

    def blocks(
        self, path: Path, what: str, extent: Extent, *, block_bytes: int, cut: slice | None = None
    ) -> Bytes:
        """The bytes [cut.start, cut.stop) of a member, or all, after a check of every block they touch."""
        cut = cut or slice(0, extent.bytes)
        if cut.stop > extent.bytes:  # never a shorter piece than was asked for
            region = ByteRange(path, what, extent.offset + cut.start, extent.offset + cut.stop)
            raise _final(ValueError(f"it has only {extent.bytes} bytes"), region, 1)
        if not extent.bytes:
            return np.empty(0, dtype=np.uint8)
        first, stop = cut.start // block_bytes, -(-cut.stop // block_bytes)
        begin, end = first * block_bytes, min(stop * block_bytes, extent.bytes)
        region = ByteRange(path, what, extent.offset + begin, extent.offset + end)

        def checked(data: Bytes) -> Bytes:
            _check_blocks(data, extent.crcs[first:stop], region, block_bytes=block_bytes)
            return data[cut.start - begin : cut.stop - begin]

        return self.parsed(region, checked)

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _persistently(self, region: ByteRange, read: Callable[[], X]) -> X:
        for attempt in range(self._attempts):
            try:
                return read()
            except (OSError, ValueError) as error:
                self._forget(region.path)  # a stale handle stays stale
                failure: Exception = error
                if isinstance(error, OSError) and error.errno not in _TRANSIENT:
                    break
            if attempt < self._attempts - 1:
                time.sleep(self._jitter.uniform(0, self._backoff_s * 2**attempt))
        raise _final(failure, region, self._attempts) from failure

    def _pread(self, region: ByteRange) -> Bytes:
        descriptor = self._descriptor(region.path)
        data = np.empty(region.stop - region.start, dtype=np.uint8)
        view, done = data.data, 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done:]], region.start + done)
            if got == 0:
                raise ValueError(f"the file ends at byte {region.start + done}")
            done += got
        return data

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= self._max_open:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[path]

    def _forget(self, path: Path) -> None:
        descriptor = self._open.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)


def _check_blocks(
    data: Bytes, crcs: NDArray[np.uint32], region: ByteRange, *, block_bytes: int
) -> None:
    view = data.data
    for number, want in enumerate(crcs):
        start = number * block_bytes
        block = view[start : start + block_bytes]
        got = crc32c.crc32c(block)
        if got != want:
            at = region.start + start
            raise ValueError(
                f"CRC32C {got:08x}, expected {want:08x}, in bytes {at}-{at + len(block)}"
            )


def _final(failure: Exception, region: ByteRange, attempts: int) -> DataError | RetryableError:
    corpus = region.path.parent
    if isinstance(failure, OSError):
        reason = failure.strerror or str(failure)
        if failure.errno in _TRANSIENT:
            return RetryableError(
                f"{region}: {reason}, {attempts} times; mend the file system, then start again"
            )
    else:
        reason = str(failure)
    return DataError(
        f"{region}: {reason}. Restore this file from a copy, or make the corpus again with "
        f"`lmscale prepare`; check the rest with: lmscale verify {corpus}"
    )
