"""How tensors lie in a file: safetensors' own format, so that any safetensors reader opens it.

    8 bytes: length of the header | header: JSON, padded with spaces | the tensors, without gaps

A piece of a sharded tensor is stored under "name[64:128,0:256]", a whole tensor under its name.

The manifest's `tensors`: which box of which tensor lies where, for us and for other programs.

{"model.decoder.norm.weight": {"dtype": "F32", "shape": [64], "parts": [
    {"offsets": [0], "sizes": [64], "file": "rank-00000.safetensors", "bytes": [1024, 1280]}]}}
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

# Masters, moments, counters and generator states. Lower precisions are missing on purpose: an engine
# that handed over bf16 weights would lose its masters without a sound.
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
}
TORCH = {name: dtype for dtype, name in DTYPES.items()}
_ALIGN = (
    64  # of the first tensor; wide types come first, so all tensors are aligned to their own size
)
_WINDOW_BYTES = 32 << 20  # host memory that copies of device or strided tensors take at a time

assert sys.byteorder == "little", "safetensors files are little-endian"


@dataclass(frozen=True, slots=True)
class TensorBox:
    """A box of a tensor that one file holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def key(self) -> str:
        """Name in the safetensors header."""
        if self.sizes == self.shape:
            return self.name
        spans = (f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True))
        return f"{self.name}[{','.join(spans)}]"


def in_file_order(parts: Sequence[TensorBox]) -> list[TensorBox]:
    """Wide types first (alignment), then by name and place."""
    return sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name, part.offsets))


def header(parts: Sequence[TensorBox]) -> tuple[bytes, list[int]]:
    """The bytes before the first tensor, and where in the file each tensor begins."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, begin = [], 0
    for part in parts:
        assert part.key not in table, f"{part.key} twice in one file"
        table[part.key] = {
            "dtype": DTYPES[part.dtype],
            "shape": part.sizes,
            "data_offsets": (begin, begin + part.bytes),
        }
        begins.append(begin)
        begin += part.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [start + begin for begin in begins]


def raw_bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, without a copy where it lies so in host memory."""
    if not tensor.numel():
        return
    if tensor.is_contiguous():
        flat = tensor.detach().view(-1)
        # Host memory is not copied, so it needs no window.
        window = flat.numel() if flat.device.type == "cpu" else _WINDOW_BYTES // flat.itemsize
        for piece in flat.split(window):
            yield memoryview(piece.cpu().numpy()).cast("B")
        return
    row_bytes = tensor.numel() // tensor.shape[0] * tensor.itemsize
    for rows in tensor.detach().split(max(1, _WINDOW_BYTES // row_bytes)):
        yield from raw_bytes(rows.contiguous())


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a part lies."""

    file: str
    begin: int  # bytes from the start of the file
    sizes: tuple[int, ...]
    dtype: torch.dtype


def to_table(placed: Iterable[tuple[TensorBox, str, int]]) -> dict[str, Any]:
    """The manifest's table of (part, file, first byte). Every tensor must be complete."""
    table: dict[str, Any] = {}
    for part, file, begin in sorted(placed, key=lambda one: (one[0].name, one[0].offsets)):
        entry = table.setdefault(
            part.name, {"dtype": DTYPES[part.dtype], "shape": list(part.shape), "parts": []}
        )
        assert entry["shape"] == list(part.shape), f"{part.name}: ranks disagree about its shape"
        entry["parts"].append(
            {
                "offsets": list(part.offsets),
                "sizes": list(part.sizes),
                "file": file,
                "bytes": [begin, begin + part.bytes],
            }
        )
    for name, entry in table.items():
        held = sum(math.prod(part["sizes"]) for part in entry["parts"])
        # Overlaps are the planner's to find; with them excluded, volume means completeness.
        assert held == math.prod(entry["shape"]), f"{name}: {held} elements for {entry['shape']}"
    return table


def from_table(table: Mapping[str, Any]) -> tuple[Metadata, dict[MetadataIndex, TensorLocation]]:
    """What torch.distributed.checkpoint plans a load with, and where each part lies."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, TensorLocation] = {}
    for name, entry in table.items():
        dtype = TORCH[entry["dtype"]]
        chunks = []
        for part in entry["parts"]:
            offsets, sizes = torch.Size(part["offsets"]), torch.Size(part["sizes"])
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            place = TensorLocation(part["file"], part["bytes"][0], tuple(sizes), dtype)
            places[MetadataIndex(name, offsets)] = place
        tensors[name] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size(entry["shape"]), chunks
        )
    return Metadata(tensors), places
