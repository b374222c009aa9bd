"""Reads of ranges of a corpus' files; every block is checked against its CRC32C before it is used."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import crc32c
import numpy as np
from numpy.typing import NDArray

from lmscale.base.errors import DataError, LmscaleError, RetryableError
from lmscale.base.fs import UnsuitableFile
from lmscale.base.storage import TRANSIENT_ERRORS, OpenFiles
from lmscale.corpus.shard_format import Extent

Bytes = NDArray[np.uint8]
X = TypeVar("X")

_ATTEMPTS = 3


class ByteRange(NamedTuple):
    """A range of one file, and its name in error messages."""

    path: Path
    what: str  # e.g. "chunk 17"
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.path} {self.what} (bytes {self.start}-{self.stop})"


class CheckedFiles:
    """Range reads with a bounded number of open files. One thread at a time.

    A read that fails, or whose bytes are wrong, is repeated with exponential backoff and full jitter:
    cold caches of network file systems have caused both. Bytes that stay wrong are DataError. A system
    error that persists (EIO, ESTALE, a timeout) proves nothing about the data and is RetryableError.
    """

    def __init__(
        self, *, max_open: int = 64, backoff_s: float = 0.2, attempts: int = _ATTEMPTS
    ) -> None:
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._files = OpenFiles(max_open=max_open)
        self._jitter = random.Random()  # for waiting times only, never for data

    def read(self, region: ByteRange) -> Bytes:
        """The bytes of a region; only their number is checked."""
        return self._retrying(region, lambda: self._pread(region))

    def parsed(self, region: ByteRange, parse: Callable[[Bytes], X]) -> X:
        """The result of `parse` for a region; a ValueError of it is damage, and its text the reason."""
        return self._retrying(region, lambda: parse(self._pread(region)))

    def blocks(
        self, path: Path, what: str, extent: Extent, *, block_bytes: int, cut: slice | None = None
    ) -> Bytes:
        """The bytes [cut.start, cut.stop) of a member, or all of it; every block they touch is checked."""
        cut = cut or slice(0, extent.bytes)
        if cut.stop > extent.bytes:  # never return fewer bytes than requested
            region = ByteRange(path, what, extent.offset + cut.start, extent.offset + cut.stop)
            raise _permanent_error(ValueError(f"it has only {extent.bytes} bytes"), region, 1)
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
        self._files.close()

    def _retrying(self, region: ByteRange, read: Callable[[], X]) -> X:
        for attempt in range(self._attempts):
            try:
                return read()
            except (OSError, ValueError, UnsuitableFile) as error:
                self._files.forget(region.path)  # a stale handle stays stale
                failure: Exception = error
                if isinstance(error, UnsuitableFile):
                    break
                if isinstance(error, OSError) and error.errno not in TRANSIENT_ERRORS:
                    break
            if attempt < self._attempts - 1:
                time.sleep(self._jitter.uniform(0, self._backoff_s * 2**attempt))
        raise _permanent_error(failure, region, self._attempts) from failure

    def _pread(self, region: ByteRange) -> Bytes:
        data = np.empty(region.stop - region.start, dtype=np.uint8)
        count = self._files.get(region.path).read_into(data.data, region.start)
        if count < len(data):
            raise ValueError(f"the file ends at byte {region.start + count}")
        return data


def _check_blocks(
    data: Bytes, crcs: NDArray[np.uint32], region: ByteRange, *, block_bytes: int
) -> None:
    view = data.data
    for number, expected in enumerate(crcs):
        start = number * block_bytes
        block = view[start : start + block_bytes]
        computed = crc32c.crc32c(block)
        if computed != expected:
            first = region.start + start
            raise ValueError(
                f"CRC32C {computed:08x}, expected {expected:08x}, in bytes {first}-{first + len(block)}"
            )


def _permanent_error(failure: Exception, region: ByteRange, attempts: int) -> LmscaleError:
    corpus = region.path.parent
    if isinstance(failure, OSError):
        reason = failure.strerror or str(failure)
        if failure.errno in TRANSIENT_ERRORS:
            return RetryableError(
                f"{region}: the read failed {attempts} times ({reason}). "
                "Check the file system, then start again"
            )
    else:
        reason = str(failure)
    return DataError(
        f"{region}: {reason}. Restore this file from a copy, or prepare the corpus again with "
        f"`lmscale prepare`; check the other files with: lmscale verify {corpus}"
    )
