"""`prepare` turns raw text into corpora: the order of the passes, and the state of OUT (new, unfinished, finished).

    input -> slices -> [workers: raw ids in scratch] -> cuts -> [workers: shards] -> manifests

Slices follow from the input, cuts from the ids, shards from the cuts; none depends on the number of workers.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers

import lmscale
from lmscale.base.errors import ConfigError, DataError, UsageError
from lmscale.corpus.manifest import (
    MANIFEST_NAME,
    Collection,
    Manifest,
    manifest_digest,
    tokenizer_entry,
)
from lmscale.corpus.shard_format import DTYPES, ShardEntry, dtype_for, num_chunks
from lmscale.prepare.cuts import HELDOUT, TRAIN, Cuts, compute_cuts
from lmscale.prepare.documents import sample_text
from lmscale.prepare.inputs import InputFile, Slice, discover, slices
from lmscale.prepare.options import PrepareOptions
from lmscale.prepare.pass_progress import PrepareProgress, PrepareRun, ProgressCallback, run_stage
from lmscale.prepare.scratch import SCRATCH_NAME, Scratch, read_json, write_errors, write_json
from lmscale.prepare.tokenize import SliceResult, finished_slice
from lmscale.prepare.workers import finished_shard
from lmscale.tokenizer.tokenizer import Tokenizer
from lmscale.tokenizer.training import bytes_tokenizer, train_bpe

_log = logging.getLogger(__name__)
_TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """The corpora in OUT."""

    parts: dict[str, Manifest]  # train, heldout
    seconds: float
    already: bool  # an earlier run has finished it


def prepare(
    out: Path,
    inputs: Sequence[Path],
    options: PrepareOptions,
    progress: ProgressCallback = lambda _: None,
) -> Summary:
    """Write the corpora OUT/train and OUT/heldout, and OUT/manifest.json, which comes last.

    Resumes where a killed run stopped. A finished OUT is only compared with input and options;
    UsageError is raised if they differ. Raises DataError for bad input,
    RetryableError for a full disk.
    """
    begun_s = time.monotonic()
    sources = discover(inputs, out)
    input_slices = slices(sources)
    fixed = _given_tokenizer(options)
    made_from = {**options.identity(), "tokenizer_file": fixed.fingerprint if fixed else None,
                 "special": fixed.special.as_dict() if fixed else None}  # fmt: skip
    already = (out / MANIFEST_NAME).exists()
    with write_errors(out):
        if already:
            check_same_job(
                out, input_slices, made_from, num_workers=options.num_workers, progress=progress
            )
        else:
            scratch = open_scratch(out)
            with scratch.locked() as lock:
                adopt_or_reset(scratch, sources, made_from)
                _build(
                    PrepareRun(out, scratch, options, input_slices, progress, lock),
                    fixed,
                    made_from,
                )
        shutil.rmtree(out / SCRATCH_NAME, ignore_errors=already)
    parts = {name: Manifest.load(out / name) for name in sorted(Collection.load(out).parts)}
    return Summary(parts, time.monotonic() - begun_s, already)


def _build(run: PrepareRun, fixed: Tokenizer | None, made_from: dict[str, Any]) -> None:
    tokenizer = _tokenizer(run, fixed)
    results = _tokenize(run, tokenizer)
    segments = [segment for result in results for segment in result.segments]
    if not sum(segment.text_bytes for segment in segments):
        count = sum(segment.documents for segment in segments)
        raise DataError(f"input: {count} documents without any text; give files that contain text")
    cuts = compute_cuts(segments, run.scratch, every=run.options.heldout_every)
    cuts.save(run.scratch)
    digests = {part: write_part(run, cuts, part, tokenizer) for part in cuts.sizes}
    source = {**made_from, "input": combine_digests(result.source for result in results)}
    Collection(digests, source).save(run.out)


def _given_tokenizer(options: PrepareOptions) -> Tokenizer | None:
    path = options.tokenizer_path
    if path is None:
        return None
    if not path.exists():
        raise UsageError(
            f"--tokenizer {path}: no such file; give a tokenizer.json, `bytes` or `bpe:SIZE`"
        )
    tokenizer = Tokenizer.load(path)
    if tokenizer.special.frame() == ((), ()):
        raise ConfigError(
            f"--tokenizer {path}: has neither a bos nor an eos token, so documents cannot be "
            "separated; put its tokenizer_config.json (with bos_token or eos_token) beside it"
        )
    return tokenizer


def _tokenizer(run: PrepareRun, fixed: Tokenizer | None) -> Tokenizer:
    """The tokenizer of this run; one that an earlier run trained is in the scratch folder."""
    path = run.scratch.tokenizer
    if path.exists():
        return Tokenizer.load(path, None if fixed is None else fixed.special)
    if fixed is not None:
        tokenizer = fixed
    elif run.options.bpe_size is None:
        tokenizer = bytes_tokenizer()
    else:

        def consumed(done: int) -> None:
            run.progress(PrepareProgress("train tokenizer", done, run.input_bytes))

        consumed(0)
        texts = sample_text(run.slices, run.options.text_key, consumed)
        tokenizer = train_bpe(texts, run.options.bpe_size)
    tokenizer.save(path)
    return tokenizer


def _tokenize(run: PrepareRun, tokenizer: Tokenizer) -> list[SliceResult]:
    """First pass over all slices that no earlier run has finished."""
    itemsize = DTYPES[dtype_for(tokenizer.vocab_size)].itemsize
    results = {
        piece.number: finished_slice(piece.number, run.scratch, itemsize) for piece in run.slices
    }
    missing = [piece for piece in run.slices if results[piece.number] is None]
    arguments = {
        "call": "tokenize",
        "scratch": str(run.scratch.path),
        "fingerprint": tokenizer.fingerprint,
        "special": tokenizer.special.as_dict(),
        "text_key": run.options.text_key,
    }
    jobs = [({**arguments, "slice": piece.as_json()}, piece.size) for piece in missing]
    for index, _ in run.stage("tokenize", jobs, total=run.input_bytes):
        number = missing[index].number
        results[number] = finished_slice(number, run.scratch, itemsize)
    finished = [result for _, result in sorted(results.items()) if result is not None]
    assert len(finished) == len(run.slices), (
        "a slice that a worker reported as finished is incomplete"
    )
    return finished


# ---- the state of OUT ----------------------------------------------------------------------------


def check_same_job(
    out: Path,
    input_slices: Sequence[Slice],
    made_from: dict[str, Any],
    *,
    num_workers: int,
    progress: ProgressCallback,
) -> None:
    """Raise UsageError unless a finished OUT was made from the same input with the same options.

    Reads all input once and compares its content, not names or times.
    """
    source = Collection.load(out).source
    differing = [key for key, value in made_from.items() if source.get(key) != value]
    if differing:
        differences = ", ".join(
            f"{key} {source.get(key)!r}, now {made_from[key]!r}" for key in differing
        )
        raise UsageError(
            f"{out} contains a finished corpus made with other options ({differences}); "
            "choose another OUT, or delete this one"
        )
    jobs = [({"call": "digest", "slice": piece.as_json()}, piece.size) for piece in input_slices]
    total = sum(size for _, size in jobs)
    digests = dict(
        run_stage("check input", jobs, total=total, num_workers=num_workers, progress=progress)
    )
    if combine_digests(digests[index] for index in range(len(jobs))) != source.get("input"):
        raise UsageError(
            f"{out} contains a finished corpus made from other input; "
            "choose another OUT, or delete this one"
        )


def open_scratch(out: Path) -> Scratch:
    """The scratch folder of an OUT that is new, empty or left by a killed run. Raises UsageError for any other."""
    scratch = Scratch(out / SCRATCH_NAME)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; choose a new folder as OUT")
    if out.is_dir() and not scratch.path.is_dir() and any(out.iterdir()):
        raise UsageError(
            f"{out} is not empty and contains no unfinished corpus; choose a new folder as OUT"
        )
    scratch.path.mkdir(parents=True, exist_ok=True)
    return scratch


def adopt_or_reset(
    scratch: Scratch, sources: Sequence[InputFile], made_from: dict[str, Any]
) -> None:
    """Keep the files of an earlier run of the same job; remove those of any other job.

    Stricter than `check_same_job`, because no input is read: a file with a new time counts as changed.
    """
    listing = json.dumps([asdict(source) for source in sources]).encode()
    job = {
        **made_from,
        "sources": hashlib.sha256(listing).hexdigest(),
        "versions": [lmscale.__version__, tokenizers.__version__],
    }
    previous = read_json(scratch.job, dict[str, Any])
    if previous == job:
        _log.info("resuming where an earlier run stopped")
        return
    if previous is not None:
        _log.info(
            "input or options have changed since an unfinished run: starting from the beginning"
        )
    for part in (
        TRAIN,
        HELDOUT,
    ):  # before job.json is removed, so that a run after a kill here does the same
        shutil.rmtree(scratch.path.parent / part, ignore_errors=True)
    scratch.clear()
    scratch.slices.mkdir()
    write_json(scratch.job, job)


def combine_digests(digests: Iterable[str]) -> str:
    """One digest of the input from those of its slices, in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# ---- second pass ---------------------------------------------------------------------------------


def write_part(run: PrepareRun, cuts: Cuts, part: str, tokenizer: Tokenizer) -> str:
    """Make OUT/PART a whole corpus; returns its manifest's digest."""
    final = run.out / part
    if final.exists():  # from an earlier run: only complete parts are moved there
        return manifest_digest(final)
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
    for left in folder.glob(
        "*.tmp"
    ):  # of a killed run of an earlier version, which used other names
        left.unlink()
    folder.rename(final)
    return digest


def _shards(run: PrepareRun, cuts: Cuts, part: str, tokenizer: Tokenizer) -> list[ShardEntry]:
    options, tokens = run.options, cuts.sizes[part].tokens
    run.scratch.shard_entry(part, 0).parent.mkdir(exist_ok=True)
    entries = {}
    missing = []
    for shard in range(-(-num_chunks(tokens, options.chunk_tokens) // options.shard_chunks)):
        recorded = read_json(run.scratch.shard_entry(part, shard), ShardEntry)
        if entry := finished_shard(recorded, run.scratch.part(part)):
            entries[shard] = entry
        else:
            missing.append(shard)
    arguments = {
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
        ({**arguments, "shard": shard}, min(whole, tokens - shard * whole) * item)
        for shard in missing
    ]
    for number, entry in run.stage(f"write {part}", jobs, total=tokens * item):
        entries[missing[number]] = ShardEntry(**entry)
    return [entries[shard] for shard in sorted(entries)]
