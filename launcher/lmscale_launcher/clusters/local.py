"""Kind `local`: `lmscale train` on this host, in the background."""

import os

from typing_extensions import override

from lmscale.base.errors import ConfigError, Problem
from lmscale_launcher.clusters import background
from lmscale_launcher.clusters.background import BackgroundCluster
from lmscale_launcher.clusters.job import JobPlan, JobRecord


class LocalCluster(BackgroundCluster):
    """This host. The supervisor's pid names the job."""

    @override
    def preview(self, plan: JobPlan) -> str:
        _check(plan)
        return background.preview(plan, plan.command)

    @override
    def submit(self, plan: JobPlan) -> JobRecord:
        _check(plan)
        return background.start(plan, plan.command, os.environ)


def _check(plan: JobPlan) -> None:
    if plan.nodes > 1:
        fact = f"{plan.nodes}, but kind local is this host alone"
        hint = "use cluster.nodes=1, or cluster=slurm or cluster=mpi for several hosts"
        raise ConfigError([Problem("cluster.nodes", fact, hint)])
