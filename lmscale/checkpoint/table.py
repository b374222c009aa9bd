"""The manifest's `tensors`: which box of which tensor lies where, for us and for other programs.

{"model.decoder.norm.weight": {"dtype": "F32", "shape": [64], "parts": [
    {"offsets": [0], "sizes": [64], "file": "rank-00000.safetensors", "bytes": [1024, 1280]}]}}
"""

import math
from collections.abc import Iterable, Mapping
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

from lmscale.checkpoint.layout import DTYPES, TORCH, Part


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part lies."""

    file: str
    begin: int  # bytes from the start of the file
    sizes: tuple[int, ...]
    dtype: torch.dtype


def to_table(placed: Iterable[tuple[Part, str, int]]) -> dict[str, Any]:
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


def from_table(table: Mapping[str, Any]) -> tuple[Metadata, dict[MetadataIndex, Place]]:
    """What torch.distributed.checkpoint plans a load with, and where each part lies."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, Place] = {}
    for name, entry in table.items():
        dtype = TORCH[entry["dtype"]]
        chunks = []
        for part in entry["parts"]:
            offsets, sizes = torch.Size(part["offsets"]), torch.Size(part["sizes"])
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            place = Place(part["file"], part["bytes"][0], tuple(sizes), dtype)
            places[MetadataIndex(name, offsets)] = place
        tensors[name] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size(entry["shape"]), chunks
        )
    return Metadata(tensors), places
