"""manifest.json: what a corpus is, and what a collection of corpora that were made together is.

The last line of the file contains a SHA-256 over all bytes before that line, so that no byte of it can
change unnoticed, and the check does not depend on how a JSON library writes numbers, escapes or blanks.

A manifest of version 2 names a table of the shards beside it (shard_table.py) and contains the table's
SHA-256. Version 1, which earlier releases wrote, lists the shards in the JSON itself; it is read too. The
fingerprint covers the content, not the form: a corpus has the same one in either version.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lmscale.base.decoding import Limits, convert, parse_json
from lmscale.base.errors import ConfigError, DataError, Problem
from lmscale.base.fs import atomic_writer, read_regular, storage_errors
from lmscale.corpus.shard_format import DTYPES, Dtype, ShardEntry, num_chunks
from lmscale.corpus.shard_table import Ints, ShardTable

MANIFEST_NAME = "manifest.json"
_LIMITS = Limits(max_bytes=1 << 30)  # version 1 lists 3 million shards in that
TABLE_NAME = "shards.npy"
FORMAT = "lmscale-corpus"
VERSION = 1  # with a list of shards; also what every fingerprint covers
TABLE_VERSION = 2  # with a table of shards
Part = Literal["train", "heldout"]

_LAST_LINE = ' "digest": "{}"\n}}\n'
_LAST_LINE_BYTES = len(_LAST_LINE.format("0" * 64))
_RESTORE = "restore it from a copy, or prepare the corpus again with: lmscale prepare OUT INPUT..."


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """The tokenizer that a corpus was written with; its file is in the corpus folder."""

    file: str
    sha256: str  # of that file
    fingerprint: str  # Tokenizer.fingerprint
    vocab_size: int
    special: dict[str, int | None]  # bos, eos, pad, unk, mask, sep, cls


@dataclass(frozen=True, slots=True)
class TableEntry:
    """The file beside a manifest that contains the table of its shards."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One corpus: a stream of tokens that is cut into chunks, and chunks that are stored in shards."""

    dtype: Dtype
    chunk_tokens: int  # a chunk stores one more: the first of the next chunk
    tokens: int  # of the whole stream
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents' text
    tokenizer: TokenizerEntry
    shards: Sequence[ShardEntry]  # kept as a ShardTable
    kind: str = "stream"
    cipher: str = "none"
    # Where the shards are listed: a file beside manifest.json, or manifest.json itself (None).
    table_file: str | None = field(default=TABLE_NAME, compare=False)

    def __post_init__(self) -> None:
        vars(self)["shards"] = ShardTable.from_entries(self.shards)

    def num_samples(self, seq_len: int) -> int:
        """Samples of seq_len targets; a shorter rest at the end belongs to no sample."""
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
    def first_chunks(self) -> Ints:
        """[shards + 1]: the first chunk of each shard, then the number of chunks."""
        return np.append(0, np.cumsum(self._table.column("chunks")))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content: equal for equal corpora, wherever and in whichever form they are."""
        body = {"format": FORMAT, "version": VERSION, **self._fields(), "shards": []}
        head, tail = _compact(body).split('"shards":[]')
        digest = hashlib.sha256(f'{head}"shards":['.encode())
        for block in self._table.canonical_json():
            digest.update(block)
        digest.update(f"]{tail}".encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> str:
        """Write the table of shards and manifest.json, the last of all files; returns its digest."""
        path = folder / MANIFEST_NAME
        self._check_sums(path)
        body = {"format": FORMAT, **self._fields(), "fingerprint": self.fingerprint}
        if self.table_file is None:
            return write_sealed(path, {**body, "version": VERSION, "shards": self._table.as_json()})
        data, table = self._table.to_npy(), folder / self.table_file
        with storage_errors(f"writing {table}"), atomic_writer(table, single_writer=True) as file:
            file.write(data)
        entry = TableEntry(self.table_file, len(data), hashlib.sha256(data).hexdigest())
        return write_sealed(path, {**body, "version": TABLE_VERSION, "shard_table": asdict(entry)})

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check manifest.json and the table. Raises DataError: missing, damaged, newer format."""
        return cls._from_json(folder, _read(folder))

    @classmethod
    def _from_json(cls, folder: Path, text: "_ManifestText") -> "Manifest":
        path, body = folder / MANIFEST_NAME, text.body
        kind, cipher = body.get("kind"), body.get("cipher")
        if kind == "collection":
            raise DataError(f"{path} is a collection; name one of its parts: {_parts(path, body)}")
        if (kind, cipher) != ("stream", "none"):
            raise DataError(
                f"{path}: kind {kind!r} with cipher {cipher!r} cannot be read by this version of "
                "lmscale; use a newer one, or prepare the corpus again"
            )
        stored = convert(_StreamBody, body, where=path, hint=_RESTORE)
        manifest = cls(
            dtype=stored.dtype,
            chunk_tokens=stored.chunk_tokens,
            tokens=stored.tokens,
            documents=stored.documents,
            text_bytes=stored.text_bytes,
            tokenizer=stored.tokenizer,
            shards=_stored_shards(folder, body["version"], stored),
            table_file=stored.shard_table.file if stored.shard_table else None,
        )
        manifest._check_sums(path)
        if stored.fingerprint != manifest.fingerprint:
            raise DataError(
                f"{path}: fingerprint {stored.fingerprint}, but its content has "
                f"{manifest.fingerprint}; {_RESTORE}"
            )
        return manifest

    @property
    def _table(self) -> ShardTable:
        return ShardTable.from_entries(self.shards)

    def _fields(self) -> dict[str, Any]:
        """All that a fingerprint covers, except the shards."""
        names = self.__dataclass_fields__.keys() - {"shards", "table_file"}
        fields = {name: getattr(self, name) for name in names}
        return {**fields, "tokenizer": asdict(self.tokenizer)}

    def _check_sums(self, path: Path) -> None:
        """Compare the numbers with each other, so that an error of the writer does not lose data."""
        chunks, tokens = (int(self._table.column(name).sum()) for name in ("chunks", "tokens"))
        expected = self.num_chunks, self.tokens + self.num_chunks - 1
        if (chunks, tokens) != expected:
            raise DataError(
                f"{path}: the shards contain {chunks} chunks of {tokens} tokens, but a stream of "
                f"{self.tokens} tokens has {expected[0]} of {expected[1]}; {_RESTORE}"
            )

    def _check_seq_len(self, seq_len: int) -> None:
        if seq_len >= 1 and self.chunk_tokens % seq_len == 0:
            return
        divisors = [n for n in range(1, self.chunk_tokens + 1) if self.chunk_tokens % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - seq_len))[:6])
        problem = Problem(
            "train.seq_len",
            f"{seq_len} does not divide the corpus' chunks of {self.chunk_tokens} tokens",
            f"use one of {', '.join(map(str, nearest))}, or prepare the corpus again with "
            "--chunk-tokens a multiple of it",
        )
        raise ConfigError([problem])


@dataclass(frozen=True, slots=True)
class Collection:
    """The result of `lmscale prepare OUT`: corpora that were made together, covered by OUT/manifest.json."""

    parts: dict[str, str]  # sub-folder -> digest of its manifest
    source: dict[str, Any]  # the inputs' digest and the options

    def save(self, folder: Path) -> str:
        """Write OUT/manifest.json, the last of all files; returns its digest."""
        body = {"format": FORMAT, "version": VERSION, "kind": "collection", **asdict(self)}
        return write_sealed(folder / MANIFEST_NAME, body)

    @classmethod
    def load(cls, folder: Path) -> "Collection":
        """Read and check OUT/manifest.json. Raises DataError."""
        body = _read(folder).body
        if body.get("kind") != "collection":
            raise DataError(f"{folder} is a single corpus, not a collection of parts")
        return convert(cls, body, where=folder / MANIFEST_NAME, hint=_RESTORE)


def corpus_kind(folder: Path) -> str:
    """`collection`, or the kind of a single corpus: `stream`. Raises DataError."""
    return str(_read(folder).body.get("kind"))


def manifest_digest(folder: Path) -> str:
    """The digest in a folder's manifest, checked. Raises DataError."""
    return _read(folder).digest


def corpus_folder(path: Path, part: Part = "train") -> Path:
    """The folder of one corpus: a part of a collection, or the path itself. Raises DataError."""
    return _find_part(path, part)[0]


def load_part(path: Path, part: Part = "train") -> tuple[Path, Manifest]:
    """`corpus_folder` and `Manifest.load`; the manifest is read only once. Raises DataError."""
    folder, text = _find_part(path, part)
    return folder, Manifest._from_json(folder, text)


def tokenizer_entry(
    path: Path, *, fingerprint: str, vocab_size: int, special: dict[str, int | None]
) -> TokenizerEntry:
    """The manifest's entry for a tokenizer file that is in the corpus folder already."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return TokenizerEntry(path.name, digest, fingerprint, vocab_size, special)


def tokenizer_path(folder: Path, manifest: Manifest) -> Path:
    """The path of the corpus' tokenizer file, whose bytes have been checked. Raises DataError."""
    path = folder / manifest.tokenizer.file
    found = hashlib.sha256(_read_bytes(path)).hexdigest()
    if found != manifest.tokenizer.sha256:
        raise DataError(
            f"{path}: SHA-256 {found}, expected {manifest.tokenizer.sha256}: "
            f"the tokenizer is damaged; {_RESTORE}"
        )
    return path


def write_sealed(path: Path, body: dict[str, Any]) -> str:
    """Write `body` as JSON whose last line contains its digest (SHA-256); returns the digest."""
    covered = json.dumps(body, indent=1, sort_keys=True).removesuffix("\n}") + ",\n"
    digest = hashlib.sha256(covered.encode()).hexdigest()
    data = (covered + _LAST_LINE.format(digest)).encode()
    with storage_errors(f"writing {path}"), atomic_writer(path, single_writer=True) as file:
        file.write(data)
    return digest


class _ManifestText(NamedTuple):
    body: dict[str, Any]
    digest: str  # of the text, checked


@dataclass(frozen=True, slots=True)
class _StreamBody:
    """The keys of a corpus' manifest.json. Exactly one of `shards` and `shard_table` is there."""

    dtype: Dtype
    chunk_tokens: int
    tokens: int
    documents: int
    text_bytes: int
    tokenizer: TokenizerEntry
    fingerprint: str
    shards: list[ShardEntry] | None = None  # version 1
    shard_table: TableEntry | None = None  # version 2


def _stored_shards(folder: Path, version: int, stored: _StreamBody) -> Sequence[ShardEntry]:
    if version == VERSION and stored.shards is not None:
        return stored.shards
    if version != TABLE_VERSION or stored.shard_table is None:
        raise DataError(f"{folder / MANIFEST_NAME}: it lists no shards; {_RESTORE}")
    path = folder / stored.shard_table.file
    data = _read_bytes(path)
    found = hashlib.sha256(data).hexdigest()
    if found != stored.shard_table.sha256:
        raise DataError(
            f"{path}: {len(data)} bytes with SHA-256 {found}, expected {stored.shard_table.bytes} "
            f"with {stored.shard_table.sha256}: the table of shards is damaged; {_RESTORE}"
        )
    try:
        return ShardTable.from_npy(data)
    except ValueError as error:
        raise DataError(f"{path}: {error}; {_RESTORE}") from error


def _find_part(path: Path, part: Part) -> tuple[Path, _ManifestText]:
    text = _read(path)
    if text.body.get("kind") != "collection":
        return path, text
    parts = _parts(path / MANIFEST_NAME, text.body)
    if part not in parts:
        raise DataError(
            f"{path} has no part {part!r}, only {', '.join(sorted(parts))}; "
            "prepare it from more documents, or name another corpus"
        )
    part_text = _read(path / part)
    if part_text.digest != parts[part]:
        raise DataError(
            f"{path / part / MANIFEST_NAME} is not the one that {path / MANIFEST_NAME} covers; "
            f"{_RESTORE}"
        )
    return path / part, part_text


def _parts(path: Path, body: dict[str, Any]) -> dict[str, str]:
    return convert(Collection, body, where=path, hint=_RESTORE).parts


def _read(folder: Path) -> _ManifestText:
    """The content of manifest.json, whose every byte has been checked. Raises DataError."""
    if not folder.exists():
        raise DataError(
            f"there is no corpus at {folder}; make it with: lmscale prepare {folder} INPUT..."
        )
    path = folder / MANIFEST_NAME
    raw = _read_bytes(path)
    covered, last = memoryview(raw)[:-_LAST_LINE_BYTES], raw[-_LAST_LINE_BYTES:]
    digest = hashlib.sha256(covered).hexdigest()
    if not covered or last != _LAST_LINE.format(digest).encode():
        raise DataError(
            f"{path}: its {len(raw)} bytes do not match the digest in its last line: "
            f"it is damaged; {_RESTORE}"
        )
    body = parse_json(raw, where=path, limits=_LIMITS, hint=_RESTORE)
    found = (body.get("format"), body.get("version")) if isinstance(body, dict) else (None, None)
    if found not in ((FORMAT, VERSION), (FORMAT, TABLE_VERSION)):
        raise DataError(
            f"{path} has format {found[0]!r}, version {found[1]!r}; this version of lmscale reads "
            f"{FORMAT!r}, versions {VERSION} and {TABLE_VERSION}: use another one, or name a corpus"
        )
    return _ManifestText(body, digest)


def _read_bytes(path: Path) -> bytes:
    try:
        data = read_regular(path, _LIMITS.max_bytes)
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: the corpus is damaged or was never finished; {_RESTORE}"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {_RESTORE}") from error
    if not data:
        raise DataError(f"{path} is empty: it is damaged; {_RESTORE}")
    return data


def _compact(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))
