"""manifest.json: what a corpus is, and what a collection of corpora made together is."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lmscale.corpus.sealed import read_sealed, write_sealed
from lmscale.corpus.shard import DTYPES, Dtype, ShardEntry, num_chunks
from lmscale.errors import ConfigError, DataError, Problem

MANIFEST_NAME = "manifest.json"
FORMAT = "lmscale-corpus"
VERSION = 1
Part = Literal["train", "heldout"]

_RESTORE = "restore it from a copy, or make the corpus again with: lmscale prepare OUT INPUT..."


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """The tokenizer a corpus was written with; its file lies in the corpus folder."""

    file: str
    sha256: str  # of that file
    fingerprint: str  # as text/ computes it
    vocab_size: int
    special: dict[str, int | None]  # bos, eos, pad, unk, mask, sep, cls


@dataclass(frozen=True, slots=True)
class Manifest:
    """One corpus: a stream of tokens cut into chunks, chunks into shards."""

    dtype: Dtype
    chunk_tokens: int  # a chunk stores one more: the first of the next chunk
    tokens: int  # of the whole stream
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents' text
    tokenizer: TokenizerEntry
    shards: tuple[ShardEntry, ...]
    kind: str = "stream"
    cipher: str = "none"

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

    @property
    def fingerprint(self) -> str:
        """Names the content: equal for equal corpora, wherever they lie."""
        text = json.dumps(self._body(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, folder: Path) -> str:
        """Write manifest.json, last of all files of a corpus; returns its digest."""
        self._check(folder / MANIFEST_NAME, self.fingerprint)
        body = {**self._body(), "fingerprint": self.fingerprint}
        return write_sealed(folder / MANIFEST_NAME, body)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check manifest.json. Raises DataError: missing, damaged, of a newer format."""
        path = folder / MANIFEST_NAME
        body, _ = _read(folder)
        if body["kind"] == "collection":
            raise DataError(f"{path} is a collection; name a part of it: {sorted(body['parts'])}")
        if (body["kind"], body["cipher"]) != ("stream", "none"):
            raise DataError(
                f"{path}: kind {body['kind']!r} with cipher {body['cipher']!r} cannot be read by "
                "this lmscale; use a newer one, or prepare the corpus again"
            )
        manifest = cls(
            dtype=body["dtype"],
            chunk_tokens=body["chunk_tokens"],
            tokens=body["tokens"],
            documents=body["documents"],
            text_bytes=body["text_bytes"],
            tokenizer=TokenizerEntry(**body["tokenizer"]),
            shards=tuple(ShardEntry(**shard) for shard in body["shards"]),
        )
        manifest._check(path, body["fingerprint"])
        return manifest

    def _body(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def _check(self, path: Path, fingerprint: str) -> None:
        """Hold the numbers against each other: a writer's bug shall not become a silent hole."""
        chunks, tokens = (
            sum(shard.chunks for shard in self.shards),
            sum(shard.tokens for shard in self.shards),
        )
        want = self.num_chunks, self.tokens + self.num_chunks - 1
        if (chunks, tokens) != want:
            raise DataError(
                f"{path}: the shards hold {chunks} chunks of {tokens} tokens, a stream of "
                f"{self.tokens} tokens needs {want[0]} of {want[1]}; {_RESTORE}"
            )
        if fingerprint != self.fingerprint:
            raise DataError(
                f"{path}: fingerprint {fingerprint}, its content has {self.fingerprint}; {_RESTORE}"
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
        body, _ = _read(folder)
        if body["kind"] != "collection":
            raise DataError(f"{folder} is a single corpus, not a collection of parts")
        return cls(body["parts"], body["source"])


def kind_of(folder: Path) -> str:
    """`collection`, or the kind of a single corpus: `stream`. Raises DataError."""
    return str(_read(folder)[0]["kind"])


def digest_of(folder: Path) -> str:
    """The digest that a folder's manifest carries, checked. Raises DataError."""
    return _read(folder)[1]


def resolve(path: Path, part: Part = "train") -> Path:
    """The folder of one corpus: a part of a collection, or the path itself. Raises DataError."""
    if kind_of(path) != "collection":
        return path
    parts = Collection.load(path).parts
    if part not in parts:
        raise DataError(
            f"{path} has no part {part!r}, only {', '.join(sorted(parts))}; "
            "prepare it from more documents, or name another corpus"
        )
    if digest_of(path / part) != parts[part]:
        raise DataError(
            f"{path / part / MANIFEST_NAME} is not the one that {path / MANIFEST_NAME} covers; "
            f"{_RESTORE}"
        )
    return path / part


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


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    if not folder.exists():
        raise DataError(
            f"there is no corpus at {folder}; make it with: lmscale prepare {folder} INPUT..."
        )
    path = folder / MANIFEST_NAME
    body, digest = read_sealed(path, restore=_RESTORE)
    found = body.get("format"), body.get("version")
    if found != (FORMAT, VERSION):
        raise DataError(
            f"{path} has format {found[0]!r}, version {found[1]!r}; this lmscale reads {FORMAT!r}, "
            f"version {VERSION}: use another lmscale, or name a corpus"
        )
    return body, digest
