"""The shards of a manifest as one table: a million of them take 130 MB, and an entry is made when it is asked for.

The text that sealed.py writes has one key a line, so that its lines can be read column by column, a block at a
time. Text of any other form (another JSON library's, names of several widths in one block) goes through json.

manifest.json: what a corpus is, and what a collection of corpora made together is.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from lmscale.base.errors import ConfigError, DataError, Problem
from lmscale.corpus.shard_format import (
    DTYPES,
    Dtype,
    ShardEntry,
    num_chunks,
    read_sealed,
    write_sealed,
)

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


MANIFEST_NAME = "manifest.json"
FORMAT = "lmscale-corpus"
VERSION = 1
Part = Literal["train", "heldout"]

# Around the shards in the text that sealed.py writes: no string holds a line feed, no other key a list.
_OPENS, _CLOSES = b'\n "shards": [\n', b"\n ],\n"
_RESTORE = "restore it from a copy, or make the corpus again with: lmscale prepare OUT INPUT..."


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """The tokenizer a corpus was written with; its file lies in the corpus folder."""

    file: str
    sha256: str  # of that file
    fingerprint: str  # as text/ computes it
    vocab_size: int
    special: dict[str, int | None]  # bos, eos, pad, unk, mask, sep, cls


@dataclass(frozen=True)
class Manifest:
    """One corpus: a stream of tokens cut into chunks, chunks into shards."""

    dtype: Dtype
    chunk_tokens: int  # a chunk stores one more: the first of the next chunk
    tokens: int  # of the whole stream
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents' text
    tokenizer: TokenizerEntry
    shards: Sequence[ShardEntry]  # kept as a table, see entries.py
    kind: str = "stream"
    cipher: str = "none"

    def __post_init__(self) -> None:
        vars(self)["shards"] = Shards.of(self.shards)

    def num_samples(self, seq_len: int) -> int:
        """Samples of seq_len targets; a last piece that is shorter belongs to no sample."""
        self._check_seq_len(seq_len)
        return max(0, (self.tokens - 1) // seq_len)

    def samples_per_chunk(self, seq_len: int) -> int:
        """Samples of each chunk but the last. Raises ConfigError where seq_len does not fit."""
        self._check_seq_len(seq_len)
        return self.chunk_tokens // seq_len

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole corpus; only the last may be shorter."""
        return num_chunks(self.tokens, self.chunk_tokens)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the tokens of a whole chunk."""
        return (self.chunk_tokens + 1) * DTYPES[self.dtype].itemsize

    @cached_property
    def firsts(self) -> Ints:
        """[shards + 1]: the first chunk of each shard, then the number of chunks."""
        return np.append(0, np.cumsum(Shards.of(self.shards).column("chunks")))

    @cached_property
    def fingerprint(self) -> str:
        """Names the content: equal for equal corpora, wherever they lie."""
        digest = _Fingerprint(self._body([]))
        for piece in Shards.of(self.shards).compact():
            digest.update(piece)
        return digest.hexdigest()

    def save(self, folder: Path) -> str:
        """Write manifest.json, last of all files of a corpus; returns its digest."""
        path = folder / MANIFEST_NAME
        self._check(path)
        body = self._body(Shards.of(self.shards).bodies())
        return write_sealed(path, {**body, "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check manifest.json. Raises DataError: missing, damaged, of a newer format."""
        return cls._of(folder / MANIFEST_NAME, _read(folder))

    @classmethod
    def _of(cls, path: Path, text: "_Text") -> "Manifest":
        body = text.body
        if body["kind"] == "collection":
            raise DataError(f"{path} is a collection; name a part of it: {sorted(body['parts'])}")
        if (body["kind"], body["cipher"]) != ("stream", "none"):
            raise DataError(
                f"{path}: kind {body['kind']!r} with cipher {body['cipher']!r} cannot be read by "
                "this lmscale; use a newer one, or prepare the corpus again"
            )
        digest = _Fingerprint({key: body[key] for key in _COVERED})
        manifest = cls(
            dtype=body["dtype"],
            chunk_tokens=body["chunk_tokens"],
            tokens=body["tokens"],
            documents=body["documents"],
            text_bytes=body["text_bytes"],
            tokenizer=TokenizerEntry(**body["tokenizer"]),
            shards=Shards.parse(*text.shards, digest.update),
        )
        vars(manifest)["fingerprint"] = found = digest.hexdigest()
        manifest._check(path)
        if body["fingerprint"] != found:
            raise DataError(
                f"{path}: fingerprint {body['fingerprint']}, its content has {found}; {_RESTORE}"
            )
        return manifest

    def _body(self, shards: list[dict[str, Any]]) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        own |= {"tokenizer": asdict(self.tokenizer), "shards": shards}
        return {"format": FORMAT, "version": VERSION, **own}

    def _check(self, path: Path) -> None:
        """Hold the numbers against each other: a writer's bug shall not become a silent hole."""
        table = Shards.of(self.shards)
        chunks, tokens = (int(table.column(name).sum()) for name in ("chunks", "tokens"))
        want = self.num_chunks, self.tokens + self.num_chunks - 1
        if (chunks, tokens) != want:
            raise DataError(
                f"{path}: the shards hold {chunks} chunks of {tokens} tokens, a stream of "
                f"{self.tokens} tokens needs {want[0]} of {want[1]}; {_RESTORE}"
            )

    def _check_seq_len(self, seq_len: int) -> None:
        if seq_len >= 1 and self.chunk_tokens % seq_len == 0:
            return
        divisors = [n for n in range(1, self.chunk_tokens + 1) if self.chunk_tokens % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - seq_len))[:6])
        problem = Problem(
            "train.seq_len",
            f"{seq_len} does not divide the corpus' chunks of {self.chunk_tokens} tokens",
            f"use one of {', '.join(map(str, near))}, or prepare the corpus again with "
            "--chunk-tokens a multiple of it",
        )
        raise ConfigError([problem])


# By a fingerprint, besides the shards.
_COVERED = {"format", "version", *Manifest.__dataclass_fields__} - {"shards"}


@dataclass(frozen=True, slots=True)
class Collection:
    """What `lmscale prepare OUT` leaves: corpora made together, covered by OUT/manifest.json."""

    parts: dict[str, str]  # sub-folder -> digest of its manifest
    source: dict[str, Any]  # what it was made from: the inputs' fingerprint and the options

    def save(self, folder: Path) -> str:
        """Write OUT/manifest.json, last of all; returns its digest."""
        body = {"format": FORMAT, "version": VERSION, "kind": "collection", **asdict(self)}
        return write_sealed(folder / MANIFEST_NAME, body)

    @classmethod
    def load(cls, folder: Path) -> "Collection":
        """Read and check OUT/manifest.json. Raises DataError."""
        body = _read(folder).body
        if body["kind"] != "collection":
            raise DataError(f"{folder} is a single corpus, not a collection of parts")
        return cls(body["parts"], body["source"])


def corpus_kind(folder: Path) -> str:
    """`collection`, or the kind of a single corpus: `stream`. Raises DataError."""
    return str(_read(folder).body["kind"])


def manifest_digest(folder: Path) -> str:
    """The digest that a folder's manifest carries, checked. Raises DataError."""
    return _read(folder).digest


def corpus_folder(path: Path, part: Part = "train") -> Path:
    """The folder of one corpus: a part of a collection, or the path itself. Raises DataError."""
    return _resolved(path, part)[0]


def load_part(path: Path, part: Part = "train") -> tuple[Path, Manifest]:
    """`corpus_folder` and `Manifest.load`, which together read a large manifest twice. Raises DataError."""
    folder, text = _resolved(path, part)
    return folder, Manifest._of(folder / MANIFEST_NAME, text)


def _resolved(path: Path, part: Part) -> tuple[Path, "_Text"]:
    whole = _read(path)
    if whole.body["kind"] != "collection":
        return path, whole
    if part not in (parts := whole.body["parts"]):
        raise DataError(
            f"{path} has no part {part!r}, only {', '.join(sorted(parts))}; "
            "prepare it from more documents, or name another corpus"
        )
    text = _read(path / part)
    if text.digest != parts[part]:
        raise DataError(
            f"{path / part / MANIFEST_NAME} is not the one that {path / MANIFEST_NAME} covers; "
            f"{_RESTORE}"
        )
    return path / part, text


def tokenizer_entry(
    path: Path, *, fingerprint: str, vocab_size: int, special: dict[str, int | None]
) -> TokenizerEntry:
    """The manifest's words for a tokenizer file that lies in the corpus folder already."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return TokenizerEntry(path.name, digest, fingerprint, vocab_size, special)


def tokenizer_path(folder: Path, manifest: Manifest) -> Path:
    """The corpus' tokenizer file, its bytes checked. Raises DataError."""
    path = folder / manifest.tokenizer.file
    try:
        got = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {_RESTORE}") from error
    if got != manifest.tokenizer.sha256:
        raise DataError(
            f"{path}: SHA-256 {got}, expected {manifest.tokenizer.sha256}: "
            f"the tokenizer is damaged; {_RESTORE}"
        )
    return path


class _Text(NamedTuple):
    """What stands in a manifest.json, its bytes checked."""

    body: dict[str, Any]  # without shards
    shards: tuple[bytes, slice]  # the inside of that list, which may have 300 MB
    digest: str


class _Fingerprint:
    """SHA-256 of a manifest's canonical text, whose shards come piece by piece."""

    def __init__(self, body: dict[str, Any]) -> None:
        """`body`: all but its shards."""
        text = json.dumps({**body, "shards": []}, sort_keys=True, separators=(",", ":"))
        head, self._tail = text.split('"shards":[]')
        self._sha256 = hashlib.sha256(f'{head}"shards":['.encode())

    def update(self, shards: bytes) -> None:
        """The next piece of the list's inside."""
        self._sha256.update(shards)

    def hexdigest(self) -> str:
        """To be called once, after the last piece."""
        self._sha256.update(f"]{self._tail}".encode())
        return self._sha256.hexdigest()


def _read(folder: Path) -> _Text:
    if not folder.exists():
        raise DataError(
            f"there is no corpus at {folder}; make it with: lmscale prepare {folder} INPUT..."
        )
    path = folder / MANIFEST_NAME
    raw, digest = read_sealed(path, restore=_RESTORE)
    body, shards = _cut(raw)
    found = body.get("format"), body.get("version")
    if found != (FORMAT, VERSION):
        raise DataError(
            f"{path} has format {found[0]!r}, version {found[1]!r}; this lmscale reads {FORMAT!r}, "
            f"version {VERSION}: use another lmscale, or name a corpus"
        )
    return _Text(body, shards, digest)


def _cut(raw: bytes) -> tuple[dict[str, Any], tuple[bytes, slice]]:
    inside = slice(raw.find(_OPENS) + len(_OPENS), raw.rfind(_CLOSES))
    if len(_OPENS) <= inside.start <= inside.stop:
        body: dict[str, Any] = json.loads(raw[: inside.start] + raw[inside.stop :])
    else:  # no shards, or not the text of sealed.py
        body = json.loads(raw)
        raw = json.dumps(body.get("shards", [])).encode()
        inside = slice(1, len(raw) - 1)
    body.pop("shards", None)
    return body, (raw, inside)
