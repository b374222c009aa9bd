"""Kind `local`: `lmscale train` on this host, in the background."""

import os
from collections.abc import Sequence

from lmscale.base.errors import ConfigError, Problem
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters import background
from lmscale_launcher.clusters.base import JobState
from lmscale_launcher.jobs.job_plan import JobPlan, JobRecord


class LocalCluster:
    """This host. The supervisor's pid names the job; nothing is ever pending."""

    def preview(self, plan: JobPlan) -> str:
        """See Cluster."""
        _check(plan)
        return background.preview(plan, plan.command)

    def submit(self, plan: JobPlan) -> JobRecord:
        """See Cluster. The record of a job that has ended within seconds has its exit code in `facts`."""
        _check(plan)
        return background.start(plan, plan.command, os.environ)

    def states(self, jobs: Sequence[tuple[RunFolder, JobRecord]]) -> list[JobState]:
        """See Cluster."""
        return [background.state(folder, record) for folder, record in jobs]

    def cancel(self, folder: RunFolder, record: JobRecord) -> None:
        """See Cluster."""
        background.kill(record)

    def withdraw(self, folder: RunFolder, record: JobRecord) -> bool:
        """See Cluster: a local job has always started."""
        return False


def _check(plan: JobPlan) -> None:
    if plan.nodes > 1:
        fact = f"{plan.nodes}, but kind local is this host alone"
        hint = "use cluster.nodes=1, or cluster=slurm or cluster=mpi for several hosts"
        raise ConfigError([Problem("cluster.nodes", fact, hint)])
