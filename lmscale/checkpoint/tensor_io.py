"""Read parts of files, every byte checked before use: a StorageReader of torch.distributed.checkpoint.

Write this rank's parts into one file: a StorageWriter of torch.distributed.checkpoint.
"""

import errno
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from lmscale.base.errors import CheckpointError, RetryableError
from lmscale.base.fs import storage_error
from lmscale.checkpoint.tensor_format import (
    TensorBox,
    TensorLocation,
    from_table,
    header,
    in_file_order,
    raw_bytes,
    to_table,
)
from lmscale.run_folder.checkpoints import BLOCK_BYTES

logger = logging.getLogger(__name__)

_WINDOW_BYTES = 32 << 20  # host memory of a load, whatever the tensors' size
_RETRY_AFTER_S = (0.5, 2.0)
_NEXT = "use another checkpoint of the run, or restore this file from a copy"


class FilesReader(StorageReader):
    """Reads a published checkpoint. `manifest`: its body, the same on all ranks."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]):
        self._directory = directory
        self._files = manifest["files"]
        self._metadata, self._places = from_table(manifest["tensors"])

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from load to load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Names, shapes and parts."""
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add on a rank."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to arrange: each rank reads what it needs."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's tensors in place, file by file, front to back."""

        def place_of(item: ReadItem) -> TensorLocation:
            return self._places[item.storage_index]

        ordered = sorted(plan.items, key=lambda item: (place_of(item).file, place_of(item).begin))
        for name, items in groupby(ordered, key=lambda item: place_of(item).file):
            blocks = Blocks(self._directory / name, self._files[name])
            try:
                for item in items:
                    target = planner.resolve_tensor(item)
                    fill(target.detach(), place_of(item), item, blocks)
                    planner.commit_tensor(item, target)
            finally:
                blocks.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """The folder is given to the constructor."""
        return True


def fill(target: torch.Tensor, place: TensorLocation, item: ReadItem, blocks: "Blocks") -> None:
    """Copy the box that `item` asks of a stored part into `target`, a window of rows at a time."""
    sizes, offsets, lengths = place.sizes, tuple(item.storage_offsets), tuple(item.lengths)
    while sizes and sizes[0] == 1:  # a lone row may be longer than a window: go by its elements
        sizes, offsets, lengths, target = sizes[1:], offsets[1:], lengths[1:], target[0]
    if not sizes:
        sizes, offsets, lengths, target = (1,), (0,), (1,), target.view(1)
    row_bytes = math.prod(sizes[1:]) * place.dtype.itemsize
    step = max(1, _WINDOW_BYTES // row_bytes)
    for first in range(0, lengths[0], step):
        rows = min(step, lengths[0] - first)
        begin = place.begin + (offsets[0] + first) * row_bytes
        data = blocks.read(begin, begin + rows * row_bytes)
        box = torch.frombuffer(data, dtype=place.dtype).view(rows, *sizes[1:])
        for dim in range(1, len(sizes)):
            box = box.narrow(dim, offsets[dim], lengths[dim])
        target[first : first + rows].copy_(box)


class Blocks:
    """One file, read in whole blocks whose CRC32C is checked before a byte is given out."""

    def __init__(self, path: Path, entry: Mapping[str, Any]):
        self._path = path
        self._size: int = entry["bytes"]
        self._block_bytes: int = entry["block_bytes"]
        self._sums: list[int] = entry["crc32c"]
        self._descriptor = -1
        self._buffer = bytearray()
        self._held = range(0)  # bytes of the file that the buffer holds, checked

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of the file, valid until the next call. CheckpointError when damaged."""
        if not (self._held.start <= begin and end <= self._held.stop):
            self._hold(begin // self._block_bytes, -(-end // self._block_bytes))
        return memoryview(self._buffer)[begin - self._held.start : end - self._held.start]

    def close(self) -> None:
        """Give the file back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _hold(self, first: int, last: int) -> None:
        begin, end = first * self._block_bytes, min(last * self._block_bytes, self._size)
        self._held = range(0)
        if len(self._buffer) < end - begin:
            self._buffer = bytearray(end - begin)
        view = memoryview(self._buffer)[: end - begin]
        self._read_with_retries(view, begin)
        for block in range(first, last):
            start = (block - first) * self._block_bytes
            got = crc32c(view[start : start + self._block_bytes])
            if got != self._sums[block]:
                raise CheckpointError(
                    f"{self._path}: block {block} (bytes {begin + start}-"
                    f"{min(begin + start + self._block_bytes, end)}) has CRC32C {got:08x}, "
                    f"expected {self._sums[block]:08x}: damaged; {_NEXT}"
                )
        self._held = range(begin, end)

    def _read_with_retries(self, view: memoryview, begin: int) -> None:
        for wait_s in (*_RETRY_AFTER_S, None):
            try:
                self._read_full(view, begin)
                return
            except FileNotFoundError as error:
                raise self._missing() from error
            except OSError as error:
                self.close()  # a stale handle needs a new one
                problem = storage_error(f"reading {self._path}", error)
                if wait_s is None or not isinstance(problem, RetryableError):
                    raise problem from error
                logger.warning("%s: %s; trying again", self._path, error.strerror)
                time.sleep(wait_s)

    def _read_full(self, view: memoryview, begin: int) -> None:
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        size = os.fstat(self._descriptor).st_size
        if size != self._size:
            raise CheckpointError(
                f"{self._path}: {size} bytes, expected {self._size}: damaged; {_NEXT}"
            )
        while view:
            count = os.preadv(self._descriptor, [view], begin)
            if count == 0:
                raise OSError(errno.EIO, f"file ended early at byte {begin}")
            view, begin = view[count:], begin + count

    def _missing(self) -> CheckpointError | RetryableError:
        if self._path.parent.exists():
            return CheckpointError(f"{self._path}: missing: damaged; {_NEXT}")
        # No proof of damage: another attempt's retention, or an unmounted disk.
        return RetryableError(f"{self._path.parent} is gone; list the checkpoints anew")


@dataclass(frozen=True, slots=True)
class Written:
    """One finished file: its entry of the manifest, and the first byte of each part."""

    entry: dict[str, Any]
    parts: list[tuple[TensorBox, int]]


class FilesWriter(StorageWriter):
    """Writes `rank-R.safetensors` into an existing folder, then hands files and tensors to `seal`.

    `seal(files, tensors)` runs on the coordinator once every rank's file is on the disk; it gets the two
    tables of the manifest. A rank without parts writes no file.
    """

    def __init__(self, directory: Path, seal: Callable[[dict[str, Any], dict[str, Any]], None]):
        self._directory = directory
        self._seal = seal

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from save to save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the caller made the folder."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add on a rank."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name each rank's file."""
        return [
            replace(plan, storage_data=f"rank-{rank:05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and sync this rank's file."""
        results = []
        if plan.items:
            sources = {}
            for item in plan.items:
                data = item.tensor_data
                assert data is not None, f"{item.index.fqn} is no tensor"
                place = (tuple(data.chunk.offsets), tuple(data.chunk.sizes))
                part = TensorBox(item.index.fqn, data.properties.dtype, tuple(data.size), *place)
                sources[part] = item

            def tensor_of(part: TensorBox) -> torch.Tensor:
                tensor = planner.resolve_data(sources[part])
                assert isinstance(tensor, torch.Tensor)
                return tensor

            written = write_tensors(self._directory / plan.storage_data, list(sources), tensor_of)
            index = MetadataIndex(plan.storage_data)
            results.append(WriteResult(index, written.entry["bytes"], written))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Collect what the ranks wrote and let the caller seal it."""
        files: dict[str, Any] = {}
        placed = []
        for result in (one for of_rank in results for one in of_rank):
            name, written = result.index.fqn, result.storage_data
            files[name] = written.entry
            placed += [(part, name, begin) for part, begin in written.parts]
        self._seal(files, to_table(placed))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """The folder is given to the constructor."""
        return True


def write_tensors(
    path: Path, parts: list[TensorBox], tensor_of: Callable[[TensorBox], torch.Tensor]
) -> Written:
    """Write one safetensors file. `tensor_of` is asked for one part after another, in file order."""
    ordered = in_file_order(parts)
    head, begins = header(ordered)

    def pieces() -> Iterable[bytes | memoryview]:
        yield head
        for part in ordered:
            tensor = tensor_of(part)
            found = (tuple(tensor.shape), tensor.dtype)
            assert found == (part.sizes, part.dtype), f"{part.key}: planned {part}, found {found}"
            yield from raw_bytes(tensor)

    return Written(write_blocks(path, pieces()), list(zip(ordered, begins, strict=True)))


def write_blocks(
    path: Path, pieces: Iterable[bytes | memoryview], *, block_bytes: int = BLOCK_BYTES
) -> dict[str, Any]:
    """Write and sync a file; its manifest entry, with CRC32Cs of the bytes as they left memory."""
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
