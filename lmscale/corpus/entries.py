"""The shards of a manifest as one table: a million of them take 130 MB, and an entry is made when it is asked for.

The text that sealed.py writes has one key a line, so that its lines can be read column by column, a block at a
time. Text of any other form (another JSON library's, names of several widths in one block) goes through json.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lmscale.corpus.shard import ShardEntry

Ints = NDArray[np.int64]

_FIELDS = tuple(field.name for field in fields(ShardEntry))
_TEXTS = ("name", "sha256")
_KEYS = sorted(_FIELDS)
_LINES = len(_KEYS) + 2  # an entry's keys and braces
_BLOCK_BYTES = 1 << 20  # of text looked at together: what a core's cache holds
_ENTRIES = 1 << 14  # turned into Python's objects together
_MOST_DIGITS = 18
_END = b"\n  },\n"


class Shards(Sequence[ShardEntry]):
    """The entries of a manifest, in order. Immutable."""

    def __init__(self, table: NDArray[Any]) -> None:
        """`table` has a field for each of ShardEntry's; texts are bytes."""
        self._table = table

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> "Shards":
        """These entries."""
        if isinstance(entries, Shards):
            return entries
        rows = [tuple(v.encode() if isinstance(v, str) else v for v in astuple(e)) for e in entries]
        widths = {
            name: max((len(row[_FIELDS.index(name)]) for row in rows), default=1) for name in _TEXTS
        }
        return cls(np.array(rows, dtype=_dtype(widths)))

    @classmethod
    def parse(cls, text: bytes, inside: slice, compact: Callable[[bytes], object]) -> "Shards":
        """Those of a JSON list's inside; `compact` is given what compact() would give. Raises ValueError."""
        tables: list[NDArray[Any]] = []
        for block in _blocks(text, inside):
            columns = _columns(block)
            if columns is None:
                shards = cls.of(
                    ShardEntry(**entry) for entry in json.loads(b"[" + block[:-2] + b"]")
                )
                piece, table = b"".join(shards.compact()), shards._table
            else:
                piece, table = block[:-2].translate(None, b" \n"), _joined(columns)
            compact(b"," + piece if tables else piece)
            tables.append(table)
        return cls(np.concatenate(tables)) if tables else cls.of(())

    def column(self, name: str) -> Ints:
        """A number of each entry."""
        found: Ints = self._table[name]
        return found

    def compact(self) -> Iterator[bytes]:
        """The inside of a JSON list without a blank, in pieces: what a fingerprint covers."""
        for begin in range(0, len(self), _ENTRIES):
            entries = [_body(row) for row in self._table[begin : begin + _ENTRIES].tolist()]
            text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
            yield (b"," if begin else b"") + text[1:-1].encode()

    def bodies(self) -> list[dict[str, Any]]:
        """All entries for JSON."""
        return [_body(row) for row in self._table.tolist()]

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, index: slice) -> "Shards": ...
    def __getitem__(self, index: int | slice) -> "ShardEntry | Shards":
        if isinstance(index, slice):
            return Shards(self._table[index])
        return ShardEntry(**_body(self._table[index].item()))

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[ShardEntry]:
        for begin in range(0, len(self), _ENTRIES):
            for row in self._table[begin : begin + _ENTRIES].tolist():
                yield ShardEntry(**_body(row))

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))


def _dtype(widths: dict[str, int]) -> np.dtype[Any]:
    return np.dtype([(n, f"S{widths[n]}" if n in _TEXTS else "<i8") for n in _FIELDS])


def _body(row: Sequence[Any]) -> dict[str, Any]:
    body = dict(zip(_FIELDS, row, strict=True))
    return body | {name: body[name].decode() for name in _TEXTS}


def _blocks(text: bytes, inside: slice) -> Iterator[bytes]:
    """Cut between entries where the text is as sealed.py writes it; else in one piece."""
    begin = inside.start
    while (found := text.find(_END, begin + _BLOCK_BYTES, inside.stop)) >= 0:
        yield text[begin : found + len(_END)]
        begin = found + len(_END)
    if rest := text[begin : inside.stop].strip():
        yield b"  " + rest + b",\n"


def _joined(columns: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    widths = {name: columns[name].itemsize for name in _TEXTS}
    table = np.empty(len(columns["name"]), dtype=_dtype(widths))
    for name in _FIELDS:
        table[name] = columns[name]
    return table


def _columns(block: bytes) -> dict[str, NDArray[Any]] | None:
    """The columns of whole entries, a line each; None where any byte is not where it should be."""
    text = np.frombuffer(block, dtype=np.uint8)
    feeds = np.flatnonzero(text == ord("\n"))
    if len(feeds) % _LINES:
        return None
    starts = np.concatenate(([0], feeds[:-1] + 1)).reshape(-1, _LINES)
    ends = feeds.reshape(-1, _LINES)
    for line, brace in ((0, b"  {"), (-1, b"  },")):
        at = starts[:, line]
        if (ends[:, line] - at != len(brace)).any() or (_at(block, at, len(brace)) != brace).any():
            return None
    found: dict[str, NDArray[Any]] = {}
    for line, key in enumerate(_KEYS, 1):
        before = f'   "{key}": '.encode() + b'"' * (key in _TEXTS)
        after = b'"' * (key in _TEXTS) + b"," * (key != _KEYS[-1]) + b"\n"
        first, stop = starts[:, line] + len(before), ends[:, line] + 1 - len(after)
        if (
            (stop <= first).any()
            or (_at(block, starts[:, line], len(before)) != before).any()
            or (_at(block, stop, len(after)) != after).any()
        ):
            return None
        read = _texts if key in _TEXTS else _numbers
        values = read(block, first, stop)
        if values is None:
            return None
        found[key] = values
    return found


def _at(block: bytes, offsets: Ints, width: int) -> NDArray[np.bytes_]:
    """The `width` bytes at each of these offsets, [offsets]."""
    count = len(block) - width + 1
    shifted: NDArray[np.bytes_] = np.ndarray(count, f"S{width}", block, strides=(1,))
    return shifted[offsets]


def _texts(block: bytes, first: Ints, stop: Ints) -> NDArray[np.bytes_] | None:
    """Texts of one width that stand for themselves: no blank, quote, escape or other alphabet."""
    width = int(stop[0] - first[0])
    if (stop - first != width).any():
        return None
    found = _at(block, first, width)
    flat = found.view(np.uint8)
    if ((flat <= ord(" ")) | (flat == ord('"')) | (flat == ord("\\")) | (flat >= 0x7F)).any():
        return None
    return found


def _numbers(block: bytes, first: Ints, stop: Ints) -> Ints | None:
    """Decimal numbers without a sign or a leading zero."""
    width = int((stop - first).max())
    if width > min(_MOST_DIGITS, int(stop[0])):
        return None
    digits = _at(block, stop - width, width).view(np.uint8).reshape(-1, width) - ord("0")
    digits[np.arange(width) < (first - stop + width)[:, None]] = 0
    leading = digits[np.arange(len(first)), first - stop + width] == 0
    if (digits > 9).any() or (leading & (stop - first > 1)).any():
        return None
    value: Ints = digits[:, 0].astype(np.int64)
    for column in range(1, width):
        value = value * 10 + digits[:, column]
    return value
