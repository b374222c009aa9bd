"""OUT/.prepare: what a killed run leaves, so that the next one resumes from there.

lock             locked (flock) by the run and by each of its workers
job.json         the input and options that the other files belong to
tokenizer.json
slices/000012.json               the last file of a finished slice; describes the other two
slices/000012-0003.tokens        raw ids of whole documents, framed by bos and eos
slices/000012-0003.documents     int64 pairs: ids, bytes of text; one pair per document
cuts.json        which documents each part contains
train/ heldout/  the parts, moved to OUT when they are complete
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lmscale.base.decoding import Limits, RecordError, decode_file
from lmscale.base.errors import RetryableError, UsageError
from lmscale.base.fs import FULL_ERRORS, atomic_writer, lock_folder, storage_error

T = TypeVar("T")

SCRATCH_NAME = ".prepare"
_LIMITS = Limits(max_bytes=1 << 30)
_LOCK_PATIENCE_S = 5.0  # workers of a run killed just now need a moment to die


class Scratch:
    """Paths of the scratch folder of one OUT."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job = path / "job.json"
        self.lock = path / "lock"
        self.tokenizer = path / "tokenizer.json"
        self.cuts = path / "cuts.json"
        self.slices = path / "slices"

    def slice(self, number: int) -> Path:
        """The file that says a slice is finished."""
        return self.slices / f"{number:06d}.json"

    def segment(self, number: int, segment: int, kind: str) -> Path:
        """A data file of a slice; kind: tokens | documents."""
        return self.slices / f"{number:06d}-{segment:04d}.{kind}"

    def part(self, name: str) -> Path:
        """Where a part is built."""
        return self.path / name

    def shard_entry(self, part: str, shard: int) -> Path:
        """The file that says a shard is finished."""
        return self.path / f"{part}-entries" / f"{shard:06d}.json"

    def clear(self) -> None:
        """Remove all but the lock."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != self.lock:
                entry.unlink()

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the folder against a second run; gives the descriptor that workers keep open too.

        A file system without locks (some NFS) is not guarded, which is logged.
        """
        with lock_folder(self.lock, timeout_s=_LOCK_PATIENCE_S) as lock:
            if not lock.acquired:
                raise UsageError(
                    f"{self.path.parent}: another `lmscale prepare` is at work here; "
                    "let it finish or end it, then run the command again"
                )
            yield lock.descriptor


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all, also after a power cut."""
    with atomic_writer(path, single_writer=True) as file:
        file.write(json.dumps(value).encode())


def read_json(path: Path, spec: type[T]) -> T | None:
    """The value of a JSON file of this scratch folder; None where it is missing or not of the spec."""
    try:
        return decode_file(spec, path, limits=_LIMITS)
    except (FileNotFoundError, RecordError):
        return None


@contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Turn a failed write under OUT into words."""
    try:
        yield
    except OSError as error:
        place = error.filename or out
        if error.errno in FULL_ERRORS:
            free = 0
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(out).free
            raise RetryableError(
                f"{place}: the disk is full or a limit on file sizes is reached ({error.strerror}; "
                f"{free >> 20} MiB free at {out}). Make room for about twice the size of the corpus and run "
                "the same command again: it resumes where it stopped"
            ) from error
        raise storage_error(f"writing {place}", error) from error


log = logging.getLogger(__name__)
