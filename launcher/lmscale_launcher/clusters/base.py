"""The interface of a cluster kind: how a job is started, observed and ended, and what the kind guarantees.

Everything outside a kind's own module asks these properties; nothing compares `cluster.kind` with a
name. The defaults describe processes of this host.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from lmscale.config.cluster_schema import ClusterConfig
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.job import JobPlan, JobRecord

JobPhase = Literal["pending", "running", "ended", "unknown"]


@dataclass(frozen=True, slots=True)
class JobState:
    """A cluster's answer about a job. A cluster that does not answer makes it unknown, never ended."""

    standing: JobPhase
    reason: str = ""  # for people, e.g. "more nodes than the partition has"
    hosts: tuple[str, ...] = ()  # where it runs
    code: int | None = None  # exit code, once it has ended and where it is known
    restarts: int | None = None  # by the cluster itself
    raw: str = ""  # the cluster's own term, e.g. NODE_FAIL


class RankLauncher(NamedTuple):
    """A cluster that starts the ranks itself, without a supervisor on each node."""

    setting: str  # what makes it do so, e.g. "cluster.slurm.launch=rank"
    alternative: str  # what starts a supervisor per node instead


class Cluster(ABC):
    """One kind of cluster. Its methods are the only places that run commands, each with a timeout."""

    poll_interval_s: ClassVar[float] = 2.0  # between two queries of `status` and `logs`
    stop_poll_interval_s: ClassVar[float] = (
        0.1  # between two queries of `stop`, which waits for the end
    )
    clock_skew_s: ClassVar[float] = 0.0  # between this host's clock and that of the job
    # "ended" is the scheduler's answer: it holds even where a lost node's heartbeat looks young.
    confirms_job_end: ClassVar[bool] = False
    excludes_bad_nodes: ClassVar[bool] = False  # a new job avoids the nodes in RUN/bad-nodes
    # The GPUs of this host are those of every node; else only the run file describes the nodes.
    nodes_are_like_this_host: ClassVar[bool] = True
    reports_all_hosts: ClassVar[bool] = True  # JobState.hosts lists every node of the job
    can_check_nodes: ClassVar[bool] = (
        False  # `lmscale doctor --nodes` can start a check on its nodes
    )
    tool: ClassVar[str | None] = None  # external software that `lmscale doctor` looks for

    def runs_on_this_host_only(self, cluster: ClusterConfig) -> bool:
        """Whether every rank of such a job runs on this host, so that its memory can be read here."""
        return cluster.nodes == 1

    def has_gpus_by_default(self, cluster: ClusterConfig) -> bool:
        """Whether nodes come with all their GPUs although the run file does not request any."""
        return False

    def launch_mode(self, cluster: ClusterConfig) -> str | None:
        """The tasks that the cluster starts: one per "node" or one per "rank"; None: it has no choice."""
        return None

    def rank_launcher(self, cluster: ClusterConfig) -> RankLauncher | None:
        """The setting by which the cluster starts the ranks itself; None: a supervisor per node does."""
        return None

    @abstractmethod
    def preview(self, plan: JobPlan) -> str:
        """Exactly what `submit` would run: the script and the command line. Writes nothing."""

    @abstractmethod
    def submit(self, plan: JobPlan) -> JobRecord:
        """Start or queue the job; plan.config is written.

        The record of a job that has ended within seconds has its exit code in `facts`. Raises ConfigError
        for a job that can never run, RetryableError where the cluster does not answer.
        """

    @abstractmethod
    def states(self, jobs: Sequence[tuple[RunFolder, JobRecord]]) -> list[JobState]:
        """One state per job, in their order, queried in one batch."""

    @abstractmethod
    def cancel(self, folder: RunFolder, record: JobRecord) -> None:
        """End the job now, without saving; its follow-up jobs too. Does nothing if it has ended."""

    @abstractmethod
    def withdraw(self, folder: RunFolder, record: JobRecord) -> bool:
        """Take a job that has not started, and follow-ups, out of the queue; whether there was one.

        A running job is left to see RUN/stop and to save.
        """
