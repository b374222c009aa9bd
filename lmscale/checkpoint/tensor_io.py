"""Tensor files on disk: written with one CRC32C per block, read with every block checked.

A block is 4 MiB of the file. The CRC32C is computed from the bytes as they leave memory, and it is
checked before a byte of the block reaches a tensor.
"""

import errno
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c
from torch.distributed.checkpoint.planner import ReadItem

from lmscale.base.errors import CheckpointError, RetryableError
from lmscale.base.fs import USER_ERRORS, UnsuitableFile, storage_error
from lmscale.base.retry import retry
from lmscale.base.storage import LocalFile
from lmscale.checkpoint.tensor_format import (
    TensorBox,
    TensorLocation,
    header,
    in_file_order,
    raw_bytes,
)
from lmscale.run_folder.checkpoints import BLOCK_BYTES

logger = logging.getLogger(__name__)

_WINDOW_BYTES = 32 << 20  # host memory that a load takes, whatever the size of the tensors
_RETRY_AFTER_S = (0.5, 2.0)
_NEXT = "use another checkpoint of the run, or restore this file from a copy"


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """One finished file: its manifest entry, and the offset in bytes of each box."""

    name: str  # of the file, inside the checkpoint folder
    entry: dict[str, Any]
    boxes: list[tuple[TensorBox, int]]


def write_tensors(path: Path, tensors: Mapping[TensorBox, torch.Tensor]) -> WrittenFile:
    """Write and sync one safetensors file; wide types come first. Raises OSError."""
    ordered = in_file_order(list(tensors))
    head, begins = header(ordered)

    def pieces() -> Iterable[bytes | memoryview]:
        yield head
        for box in ordered:
            tensor = tensors[box]
            actual = (tuple(tensor.shape), tensor.dtype)
            assert actual == (box.sizes, box.dtype), f"{box.key}: planned {box}, got {actual}"
            yield from raw_bytes(tensor)

    entry = write_blocks(path, pieces())
    return WrittenFile(path.name, entry, list(zip(ordered, begins, strict=True)))


def write_blocks(
    path: Path, pieces: Iterable[bytes | memoryview], *, block_bytes: int = BLOCK_BYTES
) -> dict[str, Any]:
    """Write and sync a new file; returns its manifest entry with the CRC32C of each block."""
    sums: list[int] = []
    size, checksum = 0, 0
    with open(path, "xb", buffering=1 << 20) as file:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                part = view[: block_bytes - size % block_bytes]
                checksum = crc32c(part, checksum)
                file.write(part)
                size += len(part)
                view = view[len(part) :]
                if size % block_bytes == 0:
                    sums.append(checksum)
                    checksum = 0
        if size % block_bytes:
            sums.append(checksum)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "block_bytes": block_bytes, "crc32c": sums}


def fill(
    target: torch.Tensor, location: TensorLocation, item: ReadItem, blocks: "BlockReader"
) -> None:
    """Copy the box that `item` requests of a stored one into `target`, a window of rows at a time."""
    sizes, offsets, lengths = location.sizes, tuple(item.storage_offsets), tuple(item.lengths)
    while sizes and sizes[0] == 1:  # a single row may be longer than a window, so split it
        sizes, offsets, lengths, target = sizes[1:], offsets[1:], lengths[1:], target[0]
    if not sizes:
        sizes, offsets, lengths, target = (1,), (0,), (1,), target.view(1)
    row_bytes = math.prod(sizes[1:]) * location.dtype.itemsize
    step = max(1, _WINDOW_BYTES // row_bytes)
    for first in range(0, lengths[0], step):
        rows = min(step, lengths[0] - first)
        begin = location.begin + (offsets[0] + first) * row_bytes
        data = blocks.read(begin, begin + rows * row_bytes)
        box = torch.frombuffer(data, dtype=location.dtype).view(rows, *sizes[1:])
        for dim in range(1, len(sizes)):
            box = box.narrow(dim, offsets[dim], lengths[dim])
        target[first : first + rows].copy_(box)


class BlockReader:
    """Reads one file in whole blocks and checks the CRC32C of each before it returns a byte."""

    def __init__(self, path: Path, entry: Mapping[str, Any]):
        self._path = path
        self._size: int = entry["bytes"]
        self._block_bytes: int = entry["block_bytes"]
        self._sums: list[int] = entry["crc32c"]
        self._file: LocalFile | None = None
        self._buffer = bytearray()
        self._buffered = range(0)  # the checked bytes of the file that are in the buffer

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of the file, valid until the next call. CheckpointError when damaged."""
        if not (self._buffered.start <= begin and end <= self._buffered.stop):
            self._fill_buffer(begin // self._block_bytes, -(-end // self._block_bytes))
        return memoryview(self._buffer)[begin - self._buffered.start : end - self._buffered.start]

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _fill_buffer(self, first: int, last: int) -> None:
        begin, end = first * self._block_bytes, min(last * self._block_bytes, self._size)
        self._buffered = range(0)
        if len(self._buffer) < end - begin:
            self._buffer = bytearray(end - begin)
        view = memoryview(self._buffer)[: end - begin]
        self._read_with_retries(view, begin)
        for block in range(first, last):
            start = (block - first) * self._block_bytes
            actual = crc32c(view[start : start + self._block_bytes])
            if actual != self._sums[block]:
                raise CheckpointError(
                    f"{self._path}: block {block} (bytes {begin + start}-"
                    f"{min(begin + start + self._block_bytes, end)}) has CRC32C {actual:08x}, "
                    f"expected {self._sums[block]:08x}: damaged; {_NEXT}"
                )
        self._buffered = range(begin, end)

    def _read_with_retries(self, view: memoryview, begin: int) -> None:
        try:
            retry(
                lambda: self._read_full(view, begin),
                waits_s=_RETRY_AFTER_S,
                is_transient=_is_transient,
                before_retry=self._reopen,
            )
        except UnsuitableFile as error:
            raise CheckpointError(f"{error}: damaged; {_NEXT}") from error
        except FileNotFoundError as error:
            raise self._missing() from error
        except OSError as error:
            raise storage_error(f"reading {self._path}", error) from error

    def _reopen(self, error: Exception) -> None:
        """Close the file: a stale NFS handle has to be opened again."""
        self.close()
        logger.warning("%s: %s; retrying", self._path, error)

    def _read_full(self, view: memoryview, begin: int) -> None:
        if self._file is None:
            self._file = LocalFile(self._path)
        if (size := self._file.size) != self._size:
            raise CheckpointError(
                f"{self._path}: {size} bytes, expected {self._size}: damaged; {_NEXT}"
            )
        if (count := self._file.read_into(view, begin)) < len(view):
            raise OSError(errno.EIO, f"file ended early at byte {begin + count}")

    def _missing(self) -> CheckpointError | RetryableError:
        if self._path.parent.exists():
            return CheckpointError(f"{self._path}: missing: damaged; {_NEXT}")
        # This does not prove damage: another attempt may have deleted the folder, or the disk is unmounted.
        return RetryableError(f"{self._path.parent} is gone; list the checkpoints again")


def _is_transient(error: Exception) -> bool:
    """Whether the same read may succeed later: every failure of the storage but a missing file."""
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
        return False
    return error.errno not in USER_ERRORS
