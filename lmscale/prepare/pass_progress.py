"""One stage of a run: jobs of known size, which workers do, with progress in bytes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.prepare.inputs import Slice
from lmscale.prepare.options import PrepareOptions
from lmscale.prepare.scratch import Scratch
from lmscale.prepare.workers import Job, run_all


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
        return run_stage(
            name,
            jobs,
            total=total,
            workers=self.options.num_workers,
            progress=self.progress,
            keep_open=(self.lock,),
        )


def run_stage(
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
