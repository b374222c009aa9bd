"""A small corpus on disk whose stream is known, for the tests beside it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmscale.corpus.manifest import Collection, Manifest, tokenizer_entry
from lmscale.corpus.shard_format import (
    DTYPES,
    Chunk,
    Dtype,
    chunk_range,
    num_chunks,
    shard_name,
    write_shard,
)

SPECIAL = {"bos": 0, "eos": 1, "pad": 2, "unk": None, "mask": None, "sep": None, "cls": None}


@dataclass(frozen=True)
class Made:
    path: Path
    manifest: Manifest
    stream: NDArray[np.int64]
    starts: NDArray[np.int64]  # of documents, in the whole stream


def make(
    path: Path,
    *,
    tokens: int = 333,
    chunk_tokens: int = 64,
    shard_chunks: int = 2,
    dtype: Dtype = "u16",
    documents: bool = True,
    seed: int = 0,
) -> Made:
    random = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    stream = random.integers(0, np.iinfo(DTYPES[dtype]).max, tokens, endpoint=True)
    # Documents of one token each around the first boundary: every edge of a chunk is met.
    edges = np.arange(chunk_tokens - 2, min(chunk_tokens + 3, tokens))
    starts = np.unique(np.concatenate(([0], edges, np.flatnonzero(random.random(tokens) < 0.04))))

    def chunk(number: int) -> Chunk:
        first, stop = chunk_range(number, tokens=tokens, chunk_tokens=chunk_tokens)
        inside = starts[(starts >= first) & (starts < stop)] - first
        return Chunk(stream[first:stop], inside if documents else None)

    count = num_chunks(tokens, chunk_tokens)
    shards = tuple(
        write_shard(
            path / shard_name(number),
            map(chunk, range(first, min(first + shard_chunks, count))),
            first_chunk=first,
            dtype=dtype,
        )
        for number, first in enumerate(range(0, count, shard_chunks))
    )
    tokenizer = path / "tokenizer.json"
    tokenizer.write_text('{"vocabulary": ["a", "b"]}')
    manifest = Manifest(
        dtype=dtype,
        chunk_tokens=chunk_tokens,
        tokens=tokens,
        documents=len(starts),
        text_bytes=5 * tokens,
        tokenizer=tokenizer_entry(
            tokenizer, fingerprint="f" * 64, vocab_size=1 << 16, special=SPECIAL
        ),
        shards=shards,
    )
    manifest.save(path)
    return Made(path, manifest, stream, starts if documents else np.empty(0, dtype=np.int64))


def make_collection(path: Path) -> Path:
    for seed, part in enumerate(("train", "heldout")):
        make(path / part, tokens=90 + seed, seed=seed)
    parts = {part: _digest(path / part) for part in ("train", "heldout")}
    Collection(parts, {"inputs": "abc"}).save(path)
    return path


def _digest(folder: Path) -> str:
    return Manifest.load(folder).save(folder)
