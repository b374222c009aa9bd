"""Second pass: the shards and the manifest of one part, moved to OUT when they are whole."""

from lmscale.corpus.manifest import Manifest, digest_of, tokenizer_entry
from lmscale.corpus.shard import DTYPES, ShardEntry, dtype_for, num_chunks
from lmscale.prepare.cuts import Cuts
from lmscale.prepare.scratch import read_json
from lmscale.prepare.stage import Run
from lmscale.prepare.work import finished_shard
from lmscale.text.tokenizer import Tokenizer

_TOKENIZER_NAME = "tokenizer.json"


def write_part(run: Run, cuts: Cuts, part: str, tokenizer: Tokenizer) -> str:
    """Make OUT/PART a whole corpus; returns its manifest's digest."""
    final = run.out / part
    if final.exists():  # an earlier run came that far: only whole parts are moved there
        return digest_of(final)
    folder, size = run.scratch.part(part), cuts.sizes[part]
    folder.mkdir(exist_ok=True)
    shards = _shards(run, cuts, part, tokenizer)
    tokenizer.save(folder / _TOKENIZER_NAME)
    entry = tokenizer_entry(
        folder / _TOKENIZER_NAME,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        special=tokenizer.special.as_dict(),
    )
    manifest = Manifest(
        dtype=dtype_for(tokenizer.vocab_size),
        chunk_tokens=run.options.chunk_tokens,
        tokens=size.tokens,
        documents=size.documents,
        text_bytes=size.text_bytes,
        tokenizer=entry,
        shards=tuple(shards),
    )
    digest = manifest.save(folder)
    folder.rename(final)
    return digest


def _shards(run: Run, cuts: Cuts, part: str, tokenizer: Tokenizer) -> list[ShardEntry]:
    options, tokens = run.options, cuts.sizes[part].tokens
    run.scratch.shard_entry(part, 0).parent.mkdir(exist_ok=True)
    entries = {}
    missing = []
    for shard in range(-(-num_chunks(tokens, options.chunk_tokens) // options.shard_chunks)):
        known = read_json(run.scratch.shard_entry(part, shard))
        if entry := finished_shard(known, run.scratch.part(part)):
            entries[shard] = entry
        else:
            missing.append(shard)
    plain = {
        "call": "shard",
        "scratch": str(run.scratch.path),
        "part": part,
        "chunk_tokens": options.chunk_tokens,
        "shard_chunks": options.shard_chunks,
        "vocab_size": tokenizer.vocab_size,
    }
    item = DTYPES[dtype_for(tokenizer.vocab_size)].itemsize
    whole = options.chunk_tokens * options.shard_chunks
    jobs = [
        ({**plain, "shard": shard}, min(whole, tokens - shard * whole) * item) for shard in missing
    ]
    for number, entry in run.stage(f"write {part}", jobs, total=tokens * item):
        entries[missing[number]] = ShardEntry(**entry)
    return [entries[shard] for shard in sorted(entries)]
