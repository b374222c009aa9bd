"""manifest.json: what a corpus is, and what a collection of corpora made together is."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lmscale.corpus.entries import Ints, Shards
from lmscale.corpus.sealed import read_sealed, write_sealed
from lmscale.corpus.shard import DTYPES, Dtype, ShardEntry, num_chunks
from lmscale.errors import ConfigError, DataError, Problem

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


def kind_of(folder: Path) -> str:
    """`collection`, or the kind of a single corpus: `stream`. Raises DataError."""
    return str(_read(folder).body["kind"])


def digest_of(folder: Path) -> str:
    """The digest that a folder's manifest carries, checked. Raises DataError."""
    return _read(folder).digest


def resolve(path: Path, part: Part = "train") -> Path:
    """The folder of one corpus: a part of a collection, or the path itself. Raises DataError."""
    return _resolved(path, part)[0]


def load_part(path: Path, part: Part = "train") -> tuple[Path, Manifest]:
    """`resolve` and `Manifest.load`, which together read a large manifest twice. Raises DataError."""
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
