"""The three kinds of work a worker does, called by plain JSON values."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from lmscale.corpus.shard import (
    DTYPES,
    Chunk,
    ShardEntry,
    chunk_range,
    dtype_for,
    shard_name,
    write_shard,
)
from lmscale.corpus.shard import num_chunks as chunks_of
from lmscale.prepare.cuts import Cuts, PartStream
from lmscale.prepare.documents import digest
from lmscale.prepare.inputs import Slice
from lmscale.prepare.scratch import Scratch, disk, write_json
from lmscale.prepare.tokenize import tokenize
from lmscale.text.special import Special
from lmscale.text.tokenizer import Tokenizer


def do(job: dict[str, Any], consumed: Callable[[int], None]) -> Any:  # as JSON
    """Do one job; `consumed` hears the bytes dealt with so far."""
    call = job["call"]
    if call == "digest":
        return digest(Slice.from_json(job["slice"]))
    scratch = Scratch(Path(job["scratch"]))
    with disk(scratch.path.parent):
        if call == "shard":
            return _shard(job, scratch, consumed)
        assert call == "tokenize", call
        tokenize(
            Slice.from_json(job["slice"]),
            scratch=scratch,
            tokenizer=_tokenizer(scratch.tokenizer, job["fingerprint"], Special(**job["special"])),
            text_key=job["text_key"],
            consumed=consumed,
        )
        return None


def _shard(
    job: dict[str, Any], scratch: Scratch, consumed: Callable[[int], None]
) -> dict[str, Any]:
    """Write one shard of a part and note that it is finished."""
    part, shard, chunk_tokens = job["part"], job["shard"], job["chunk_tokens"]
    cuts = Cuts.load(scratch)
    dtype = dtype_for(job["vocab_size"])
    tokens = cuts.sizes[part].tokens
    stream = PartStream(scratch, cuts, part, DTYPES[dtype])
    first = shard * job["shard_chunks"]
    stop = min(first + job["shard_chunks"], chunks_of(tokens, chunk_tokens))

    def chunks() -> Iterator[Chunk]:
        for chunk in range(first, stop):
            bounds = chunk_range(chunk, tokens=tokens, chunk_tokens=chunk_tokens)
            yield Chunk(*stream.read(*bounds))
            consumed((bounds[1] - first * chunk_tokens) * DTYPES[dtype].itemsize)

    entry = write_shard(
        scratch.part(part) / shard_name(shard), chunks(), first_chunk=first, dtype=dtype
    )
    write_json(scratch.shard_entry(part, shard), asdict(entry))
    return asdict(entry)


def finished_shard(entry: dict[str, Any] | None, folder: Path) -> ShardEntry | None:
    """The entry of a shard that an earlier run wrote, None if the file is not there whole."""
    if entry is None:
        return None
    found = ShardEntry(**entry)
    path = folder / found.name
    return found if path.is_file() and path.stat().st_size == found.bytes else None


@lru_cache(maxsize=1)
def _tokenizer(path: Path, fingerprint: str, special: Special) -> Tokenizer:
    """Loaded once a process; the fingerprint tells two at the same path apart."""
    tokenizer = Tokenizer.load(path, special)
    assert tokenizer.fingerprint == fingerprint, f"{path} is not the tokenizer of this run"
    return tokenizer
