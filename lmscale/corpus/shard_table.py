"""The shards of a corpus as one table: a million of them take 130 MB, and entries are made on demand.

The table is stored as `shards.npy` beside manifest.json: a plain numpy array with one row per shard and
one field per field of ShardEntry (64-bit little-endian integers, texts as ASCII or UTF-8 bytes). The
manifest contains its SHA-256. Reading a million shards takes 0.1 s, and their text for the fingerprint
about 1 s; as JSON both take ten times as long.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, fields
from itertools import chain
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lmscale.corpus.shard_format import ShardEntry

Ints = NDArray[np.int64]

_FIELDS = tuple(field.name for field in fields(ShardEntry))
_TEXTS = ("name", "sha256")
_BLOCK = 1 << 12  # entries converted together: their text fits into a core's cache
_PLAIN = re.compile(r"[\w.-]*", re.ASCII)  # characters that JSON writes as they are
_TEMPLATE = ",".join(
    f'"{name}":"%s"' if name in _TEXTS else f'"{name}":%d' for name in sorted(_FIELDS)
)


class ShardTable(Sequence[ShardEntry]):
    """The entries of a manifest, in order. Immutable."""

    def __init__(self, rows: NDArray[Any]) -> None:
        """`rows` has one field per field of ShardEntry; texts are bytes."""
        self._rows = rows

    @classmethod
    def from_entries(cls, entries: Iterable[ShardEntry]) -> "ShardTable":
        """The table of these entries."""
        if isinstance(entries, ShardTable):
            return entries
        rows = [tuple(v.encode() if isinstance(v, str) else v for v in astuple(e)) for e in entries]
        widths = {
            name: max((len(row[_FIELDS.index(name)]) for row in rows), default=1) for name in _TEXTS
        }
        return cls(np.array(rows, dtype=_dtype(widths)))

    @classmethod
    def from_npy(cls, data: bytes) -> "ShardTable":
        """Read what `to_npy` made, without a copy. Raises ValueError with the reason."""
        file = io.BytesIO(data)
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is not a .npy file of version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if len(shape) != 1 or dtype.names != _FIELDS:
            raise ValueError(f"it has shape {shape} and type {dtype}, expected one row per shard")
        if dtype != _dtype({name: dtype[name].itemsize for name in _TEXTS}):
            raise ValueError(f"its columns have type {dtype}, expected 64-bit integers and bytes")
        rows: NDArray[Any] = np.frombuffer(data, dtype, offset=file.tell())
        if rows.shape != shape:
            raise ValueError(f"it has {len(rows)} rows, its header says {shape[0]}")
        if len(rows) and min(int(rows[name].min()) for name in _FIELDS if name not in _TEXTS) < 0:
            raise ValueError("it contains a negative number")
        return cls(rows)

    def to_npy(self) -> bytes:
        """The content of shards.npy."""
        file = io.BytesIO()
        np.lib.format.write_array(file, self._rows, version=(1, 0), allow_pickle=False)
        return file.getvalue()

    def column(self, name: str) -> Ints:
        """One number per shard."""
        values: Ints = self._rows[name]
        return values

    def canonical_json(self) -> Iterator[bytes]:
        """The inside of a JSON list of the entries without blanks, in blocks: what a fingerprint covers."""
        for begin in range(0, len(self), _BLOCK):
            text = _canonical_text(self._rows[begin : begin + _BLOCK])
            yield (b"," if begin else b"") + text.encode()

    def as_json(self) -> list[dict[str, Any]]:
        """All entries as values for JSON."""
        return [_entry_fields(row) for row in self._rows.tolist()]

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, index: slice) -> "ShardTable": ...
    def __getitem__(self, index: int | slice) -> "ShardEntry | ShardTable":
        if isinstance(index, slice):
            return ShardTable(self._rows[index])
        return ShardEntry(**_entry_fields(self._rows[index].item()))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[ShardEntry]:
        for begin in range(0, len(self), _BLOCK):
            for row in self._rows[begin : begin + _BLOCK].tolist():
                yield ShardEntry(**_entry_fields(row))

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))


def _dtype(widths: dict[str, int]) -> np.dtype[Any]:
    return np.dtype([(n, f"S{widths[n]}" if n in _TEXTS else "<i8") for n in _FIELDS])


def _entry_fields(row: Sequence[Any]) -> dict[str, Any]:
    values = dict(zip(_FIELDS, row, strict=True))
    return values | {name: values[name].decode() for name in _TEXTS}


def _canonical_text(rows: NDArray[Any]) -> str:
    """The entries as json.dumps writes them with sorted keys and without blanks."""
    columns = {name: rows[name].tolist() for name in _FIELDS}
    for name in _TEXTS:
        columns[name] = [text.decode() for text in columns[name]]
        if not _PLAIN.fullmatch("".join(columns[name])):
            entries = [_entry_fields(row) for row in rows.tolist()]
            return json.dumps(entries, sort_keys=True, separators=(",", ":"))[1:-1]
    # One format call per block: ten times as fast as one json.dumps.
    template = ",".join(["{" + _TEMPLATE + "}"] * len(rows))
    return template % tuple(chain.from_iterable(zip(*(columns[n] for n in sorted(_FIELDS)))))  # noqa: B905
