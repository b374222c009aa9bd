"""Write this rank's parts into one file: a StorageWriter of torch.distributed.checkpoint."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lmscale.checkpoint.layout import Part, header, in_file_order, raw_bytes
from lmscale.checkpoint.table import to_table
from lmscale.run.manifest import BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Written:
    """One finished file: its entry of the manifest, and the first byte of each part."""

    entry: dict[str, Any]
    parts: list[tuple[Part, int]]


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
                part = Part(item.index.fqn, data.properties.dtype, tuple(data.size), *place)
                sources[part] = item

            def tensor_of(part: Part) -> torch.Tensor:
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
    path: Path, parts: list[Part], tensor_of: Callable[[Part], torch.Tensor]
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
