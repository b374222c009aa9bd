"""Whose OUT is this? New, finished, left by a killed run of the same job, or somebody else's."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers

import lmscale
from lmscale.corpus.manifest import Collection
from lmscale.errors import UsageError
from lmscale.prepare.cuts import HELDOUT, TRAIN
from lmscale.prepare.inputs import Slice, Source
from lmscale.prepare.scratch import SCRATCH_NAME, Scratch, read_json, write_json
from lmscale.prepare.stage import ProgressCallback, stage

log = logging.getLogger(__name__)


def check_same(
    out: Path,
    work: Sequence[Slice],
    made_from: dict[str, Any],
    *,
    workers: int,
    progress: ProgressCallback,
) -> None:
    """Raise UsageError unless a finished OUT was made from this very input with these options.

    Reads all input once: content counts, not names or times.
    """
    source = Collection.load(out).source
    other = [key for key, value in made_from.items() if source.get(key) != value]
    if other:
        facts = ", ".join(f"{key} {source.get(key)!r}, now {made_from[key]!r}" for key in other)
        raise UsageError(
            f"{out} holds a finished corpus made with other options ({facts}); "
            "choose another OUT, or delete this one"
        )
    jobs = [({"call": "digest", "slice": each.as_json()}, each.size) for each in work]
    total = sum(size for _, size in jobs)
    found = dict(stage("check input", jobs, total=total, workers=workers, progress=progress))
    if combined(found[number] for number in range(len(jobs))) != source.get("input"):
        raise UsageError(
            f"{out} holds a finished corpus made from other input; "
            "choose another OUT, or delete this one"
        )


def scratch_of(out: Path) -> Scratch:
    """The scratch folder of an OUT that is new, empty or left by a killed run. Raises UsageError for any other."""
    scratch = Scratch(out / SCRATCH_NAME)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; choose a new folder as OUT")
    if out.is_dir() and not scratch.path.is_dir() and any(out.iterdir()):
        raise UsageError(
            f"{out} is not empty and holds no unfinished corpus; choose a new folder as OUT"
        )
    scratch.path.mkdir(parents=True, exist_ok=True)
    return scratch


def claim(scratch: Scratch, sources: Sequence[Source], made_from: dict[str, Any]) -> None:
    """Keep what an earlier run of the same job left, drop anything else.

    Stricter than check_same, because nothing is read: a file that was only touched counts as changed.
    """
    listing = json.dumps([asdict(source) for source in sources]).encode()
    job = {
        **made_from,
        "sources": hashlib.sha256(listing).hexdigest(),
        "versions": [lmscale.__version__, tokenizers.__version__],
    }
    left = read_json(scratch.job)
    if left == job:
        log.info("going on where an earlier run stopped")
        return
    if left is not None:
        log.info("input or options have changed since an unfinished run: starting anew")
    for part in (TRAIN, HELDOUT):  # before job.json goes, so that a kill here is seen again
        shutil.rmtree(scratch.path.parent / part, ignore_errors=True)
    scratch.clear()
    scratch.slices.mkdir()
    write_json(scratch.job, job)


def combined(digests: Iterable[str]) -> str:
    """One digest of the input from those of its slices, in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
