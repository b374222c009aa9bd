"""What every kind of cluster can do, and which one a job belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.jobs.job_plan import JobPlan, JobRecord

Standing = Literal["pending", "running", "ended", "unknown"]


@dataclass(frozen=True, slots=True)
class JobState:
    """What a cluster says of a job. A cluster that does not answer makes it unknown, never ended."""

    standing: Standing
    reason: str = ""  # in words, e.g. "more nodes than the partition has"
    hosts: tuple[str, ...] = ()  # where it runs
    code: int | None = None  # exit code, once it has ended and where it is known
    restarts: int | None = None  # by the cluster itself
    raw: str = ""  # the cluster's own word, e.g. NODE_FAIL


class Cluster(Protocol):
    """One kind of cluster. Its methods are the only places that run commands, each with a timeout."""

    def preview(self, plan: JobPlan) -> str:
        """Exactly what `submit` would run: the script and the command line. Touches nothing."""
        ...

    def submit(self, plan: JobPlan) -> JobRecord:
        """Start or queue the job; plan.config is written. Raises ConfigError with words, RetryableError."""
        ...

    def states(self, jobs: Sequence[tuple[RunFolder, JobRecord]]) -> list[JobState]:
        """One state a job, in their order, asked for in one batch."""
        ...

    def cancel(self, folder: RunFolder, record: JobRecord) -> None:
        """End the job now, without saving; its follow-up jobs too. Does nothing if it has ended."""
        ...

    def withdraw(self, folder: RunFolder, record: JobRecord) -> bool:
        """Take a job that has not started, and follow-ups, out of the queue; whether there was one.

        A running job is left to see RUN/stop and to save.
        """
        ...
