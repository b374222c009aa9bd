"""OUT/.prepare, the scratch folder: its files let a run resume where a killed one stopped.

lock             locked (flock) by the run and by each of its workers
job.json         the input and options that the other files belong to
tokenizer.json
slices/000012.json               the last file of a finished slice; describes the other two
slices/000012-0003.tokens        raw ids of whole documents, framed by bos and eos
slices/000012-0003.documents     int64 pairs: ids, bytes of text; one pair per document
cuts.json        which documents each part contains
train/ heldout/  the parts, moved to OUT when they are complete
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from lmscale.base.decoding import Limits, RecordError, decode_file
from lmscale.base.errors import RetryableError, UsageError
from lmscale.base.fs import FULL_ERRORS, atomic_writer, lock_folder, storage_error

T = TypeVar("T")

SCRATCH_NAME = ".prepare"
_LIMITS = Limits(max_bytes=1 << 30)
_LOCK_TIMEOUT_S = 5.0  # workers of a run that has just been killed need time to end


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
        """The file whose existence marks a slice as finished."""
        return self.slices / f"{number:06d}.json"

    def segment(self, number: int, segment: int, kind: str) -> Path:
        """A data file of a slice; kind: tokens | documents."""
        return self.slices / f"{number:06d}-{segment:04d}.{kind}"

    def part(self, name: str) -> Path:
        """The folder where a part is built."""
        return self.path / name

    def shard_entry(self, part: str, shard: int) -> Path:
        """The file whose existence marks a shard as finished."""
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
        """Lock the folder against a second run; gives the descriptor that workers keep open too.

        On a file system without locks (some NFS) a warning is logged instead. Raises UsageError where
        another run has the lock.
        """
        with lock_folder(self.lock, timeout_s=_LOCK_TIMEOUT_S) as lock:
            if not lock.acquired:
                raise UsageError(
                    f"{self.path.parent}: another `lmscale prepare` is running here; "
                    "wait until it has finished or stop it, then run the command again"
                )
            yield lock.descriptor


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically and durably. The lock guarantees that there is one writer per file."""
    with atomic_writer(path, single_writer=True) as file:
        file.write(json.dumps(value).encode())


def read_json(path: Path, spec: type[T]) -> T | None:
    """The value of a JSON file of the scratch folder; None where it is missing or does not match the spec."""
    try:
        return decode_file(spec, path, limits=_LIMITS)
    except (FileNotFoundError, RecordError):
        return None


@contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Turn an OSError of a write under OUT into RetryableError or ConfigError."""
    try:
        yield
    except OSError as error:
        path = error.filename or out
        if error.errno in FULL_ERRORS:
            free = 0
            with suppress(OSError):
                free = shutil.disk_usage(out).free
            raise RetryableError(
                f"{path}: the disk is full or a limit on file sizes is reached ({error.strerror}; "
                f"{free >> 20} MiB free at {out}). Free about twice the size of the corpus and run "
                "the same command again: it resumes where it stopped"
            ) from error
        raise storage_error(f"writing {path}", error) from error
