"""`prepare`: raw text in, corpora out. The order of the passes.

    input -> slices -> [workers: raw ids in scratch] -> cuts -> [workers: shards] -> manifests

Slices follow from the input, cuts from the ids, shards from the cuts: never from the workers.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.corpus.manifest import MANIFEST_NAME, Collection, Manifest
from lmscale.corpus.shard import DTYPES, dtype_for
from lmscale.errors import ConfigError, DataError, UsageError
from lmscale.prepare.claim import check_same, claim, combined, scratch_of
from lmscale.prepare.cuts import cut
from lmscale.prepare.inputs import discover, slices
from lmscale.prepare.options import PrepareOptions
from lmscale.prepare.part import write_part
from lmscale.prepare.sample import sample
from lmscale.prepare.scratch import SCRATCH_NAME, disk
from lmscale.prepare.stage import Progress, ProgressCallback, Run
from lmscale.prepare.tokenize import SliceResult, finished_slice
from lmscale.text.tokenizer import Tokenizer
from lmscale.text.train import bytes_tokenizer, train_bpe


@dataclass(frozen=True, slots=True)
class Summary:
    """What stands in OUT."""

    parts: dict[str, Manifest]  # train, heldout
    seconds: float
    already: bool  # an earlier run had finished it


def prepare(
    out: Path,
    inputs: Sequence[Path],
    options: PrepareOptions,
    progress: ProgressCallback = lambda _: None,
) -> Summary:
    """Write the corpora OUT/train and OUT/heldout, and OUT/manifest.json, which comes last.

    Goes on where a killed run stopped. On a finished OUT it checks that input and options are the
    same and does nothing; raises UsageError if they are not. Raises DataError for bad input,
    RetryableError for a full disk.
    """
    begin = time.monotonic()
    sources = discover(inputs, out)
    work = slices(sources)
    fixed = _given_tokenizer(options)
    made_from = {**options.identity(), "tokenizer_file": fixed.fingerprint if fixed else None,
                 "special": fixed.special.as_dict() if fixed else None}  # fmt: skip
    already = (out / MANIFEST_NAME).exists()
    with disk(out):
        if already:
            check_same(out, work, made_from, workers=options.num_workers, progress=progress)
        else:
            scratch = scratch_of(out)
            with scratch.locked() as lock:
                claim(scratch, sources, made_from)
                _build(Run(out, scratch, options, work, progress, lock), fixed, made_from)
        shutil.rmtree(out / SCRATCH_NAME, ignore_errors=already)
    parts = {name: Manifest.load(out / name) for name in sorted(Collection.load(out).parts)}
    return Summary(parts, time.monotonic() - begin, already)


def _build(run: Run, fixed: Tokenizer | None, made_from: dict[str, Any]) -> None:
    tokenizer = _tokenizer(run, fixed)
    results = _tokenize(run, tokenizer)
    segments = [segment for result in results for segment in result.segments]
    if not sum(segment.text_bytes for segment in segments):
        count = sum(segment.documents for segment in segments)
        raise DataError(f"input: {count} documents without any text; give files that hold text")
    cuts = cut(segments, run.scratch, every=run.options.every)
    cuts.save(run.scratch)
    digests = {part: write_part(run, cuts, part, tokenizer) for part in cuts.sizes}
    source = {**made_from, "input": combined(result.source for result in results)}
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
            f"--tokenizer {path}: knows neither a bos nor an eos token, so documents cannot be told "
            "apart; put its tokenizer_config.json (with bos_token or eos_token) beside it"
        )
    return tokenizer


def _tokenizer(run: Run, fixed: Tokenizer | None) -> Tokenizer:
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
            run.progress(Progress("train tokenizer", done, run.input_bytes))

        consumed(0)
        texts = sample(run.work, run.options.text_key, consumed)
        tokenizer = train_bpe(texts, run.options.bpe_size)
    tokenizer.save(path)
    return tokenizer


def _tokenize(run: Run, tokenizer: Tokenizer) -> list[SliceResult]:
    """First pass over all slices that no earlier run has finished."""
    itemsize = DTYPES[dtype_for(tokenizer.vocab_size)].itemsize
    results = {each.number: finished_slice(each.number, run.scratch, itemsize) for each in run.work}
    missing = [each for each in run.work if results[each.number] is None]
    plain = {
        "call": "tokenize",
        "scratch": str(run.scratch.path),
        "fingerprint": tokenizer.fingerprint,
        "special": tokenizer.special.as_dict(),
        "text_key": run.options.text_key,
    }
    jobs = [({**plain, "slice": each.as_json()}, each.size) for each in missing]
    for number, _ in run.stage("tokenize", jobs, total=run.input_bytes):
        done = missing[number].number
        results[done] = finished_slice(done, run.scratch, itemsize)
    finished = [result for _, result in sorted(results.items()) if result is not None]
    assert len(finished) == len(run.work), "a worker said that its slice is finished"
    return finished
