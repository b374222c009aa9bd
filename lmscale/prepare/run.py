"""One stage of a run: jobs of known size, done by workers, told to whoever watches.

`prepare`: raw text in, corpora out. The order of the passes.

    input -> slices -> [workers: raw ids in scratch] -> cuts -> [workers: shards] -> manifests

Slices follow from the input, cuts from the ids, shards from the cuts: never from the workers.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.base.errors import ConfigError, DataError, UsageError
from lmscale.corpus.manifest import MANIFEST_NAME, Collection, Manifest
from lmscale.corpus.shard_format import DTYPES, dtype_for
from lmscale.prepare.cuts import cut
from lmscale.prepare.documents import sample
from lmscale.prepare.inputs import Slice, discover, slices
from lmscale.prepare.options import PrepareOptions
from lmscale.prepare.scratch import (
    SCRATCH_NAME,
    Scratch,
    check_same,
    claim,
    combined,
    disk,
    scratch_of,
)
from lmscale.prepare.tokenize import SliceResult, finished_slice, write_part
from lmscale.prepare.workers import Job, run_all
from lmscale.tokenizer.tokenizer import Tokenizer
from lmscale.tokenizer.training import bytes_tokenizer, train_bpe


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """Where a run stands, what earlier runs did included."""

    stage: str  # "check input" | "train tokenizer" | "tokenize" | "write train" | "write heldout"
    done: int  # bytes of this stage
    total: int


ProgressCallback = Callable[[PrepareProgress], None]


@dataclass(frozen=True, slots=True)
class PrepareRun:
    """What all stages of one run share."""

    out: Path
    scratch: Scratch
    options: PrepareOptions
    work: list[Slice]
    progress: ProgressCallback
    lock: int  # descriptor; workers hold it too, so that no later run meets an orphan

    @property
    def input_bytes(self) -> int:
        """Size of the input on disk."""
        return sum(each.size for each in self.work)

    def stage(
        self, name: str, jobs: Sequence[tuple[Job, int]], *, total: int
    ) -> Iterator[tuple[int, Any]]:
        """Do jobs given with their bytes; yields (number, result). `total` counts earlier runs' jobs too."""
        return stage(
            name,
            jobs,
            total=total,
            workers=self.options.num_workers,
            progress=self.progress,
            keep_open=(self.lock,),
        )


def stage(
    name: str,
    jobs: Sequence[tuple[Job, int]],
    *,
    total: int,
    workers: int,
    progress: ProgressCallback,
    keep_open: Sequence[int] = (),
) -> Iterator[tuple[int, Any]]:
    """Do jobs given with their bytes, yielding (number, result) in any order."""
    done = total - sum(size for _, size in jobs)
    running: dict[int, int] = {}

    def tell() -> None:
        progress(PrepareProgress(name, min(total, done + sum(running.values())), total))

    def report(number: int, consumed: int) -> None:
        running[number] = min(consumed, jobs[number][1])
        tell()

    tell()
    plain = [job for job, _ in jobs]
    for number, result in run_all(plain, workers=workers, report=report, keep_open=keep_open):
        running.pop(number, None)
        done += jobs[number][1]
        tell()
        yield number, result


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
                _build(PrepareRun(out, scratch, options, work, progress, lock), fixed, made_from)
        shutil.rmtree(out / SCRATCH_NAME, ignore_errors=already)
    parts = {name: Manifest.load(out / name) for name in sorted(Collection.load(out).parts)}
    return Summary(parts, time.monotonic() - begin, already)


def _build(run: PrepareRun, fixed: Tokenizer | None, made_from: dict[str, Any]) -> None:
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
        texts = sample(run.work, run.options.text_key, consumed)
        tokenizer = train_bpe(texts, run.options.bpe_size)
    tokenizer.save(path)
    return tokenizer


def _tokenize(run: PrepareRun, tokenizer: Tokenizer) -> list[SliceResult]:
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
