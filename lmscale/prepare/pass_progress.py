"""What the passes of one run share, and the progress of a stage: jobs of known size, in bytes."""

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
    """Progress of one stage, including what earlier runs have finished."""

    stage: str  # "check input" | "train tokenizer" | "tokenize" | "write train" | "write heldout"
    done: int  # bytes of this stage
    total: int


ProgressCallback = Callable[[PrepareProgress], None]


@dataclass(frozen=True, slots=True)
class PrepareRun:
    """The values that all stages of one run share."""

    out: Path
    scratch: Scratch
    options: PrepareOptions
    slices: list[Slice]
    progress: ProgressCallback
    lock: int  # descriptor; workers keep it open too, so that no later run meets an orphan

    @property
    def input_bytes(self) -> int:
        """Size of the input on disk."""
        return sum(piece.size for piece in self.slices)

    def stage(
        self, name: str, jobs: Sequence[tuple[Job, int]], *, total: int
    ) -> Iterator[tuple[int, Any]]:
        """Do jobs given with their bytes; yields (index, result). `total` includes jobs of earlier runs."""
        return run_stage(
            name,
            jobs,
            total=total,
            num_workers=self.options.num_workers,
            progress=self.progress,
            keep_open=(self.lock,),
        )


def run_stage(
    name: str,
    jobs: Sequence[tuple[Job, int]],
    *,
    total: int,
    num_workers: int,
    progress: ProgressCallback,
    keep_open: Sequence[int] = (),
) -> Iterator[tuple[int, Any]]:
    """Do jobs given with their bytes, yielding (index, result) in any order."""
    finished_bytes = total - sum(size for _, size in jobs)
    running: dict[int, int] = {}  # index of a job -> bytes of it that are done

    def publish() -> None:
        progress(PrepareProgress(name, min(total, finished_bytes + sum(running.values())), total))

    def report(index: int, consumed: int) -> None:
        running[index] = min(consumed, jobs[index][1])
        publish()

    publish()
    results = run_all(
        [job for job, _ in jobs], num_workers=num_workers, report=report, keep_open=keep_open
    )
    for index, result in results:
        running.pop(index, None)
        finished_bytes += jobs[index][1]
        publish()
        yield index, result
