"""A job as two values: what a cluster is given to start (JobPlan), and the record of what was submitted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from lmscale.config.cluster_schema import ClusterConfig
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.command_line import lmscale_command


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What one submission starts, and where. Paths are absolute and the same on every node."""

    name: str  # of the run, for lists of jobs
    run_dir: Path
    number: int  # of this submission in its run folder, from 1
    nodes: int  # at most
    min_nodes: int  # at least
    ranks_per_node: int
    gpus_per_node: int  # 0: none are requested
    workdir: Path
    python: str  # interpreter on the nodes
    cluster: ClusterConfig
    paths: tuple[Path, ...] = ()  # corpora, tokenizer, caches: what a container must mount
    env: Mapping[str, str] = field(default_factory=dict)  # of the whole job, besides cluster.env

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.run_dir)

    @property
    def config(self) -> Path:
        """The resolved run file of this submission: later edits of the user's file change nothing."""
        return self.folder.jobs / f"{self.number}.yaml"

    @property
    def script(self) -> Path:
        """What the cluster runs, kept for people and for follow-up jobs."""
        return self.folder.jobs / f"{self.number}.sh"

    @property
    def library(self) -> Path:
        """The decisions of the script, as they were when it was submitted."""
        return self.folder.jobs / f"{self.number}.lib.sh"

    @property
    def log(self) -> Path:
        """The merged log of all ranks and of every start of this job."""
        return self.folder.logs / f"job-{self.number}.log"

    @property
    def command(self) -> tuple[str, ...]:
        """What one supervisor runs on its node."""
        return (*self.rank_command, "--nproc", str(self.ranks_per_node))

    @property
    def rank_command(self) -> tuple[str, ...]:
        """What one rank runs where the cluster itself starts the ranks."""
        return tuple(lmscale_command("train", str(self.config), python=self.python))

    def in_words(self) -> str:
        """One line for people."""
        fewest = "" if self.nodes == self.min_nodes else f"{self.min_nodes} to "
        nodes = f"{fewest}{self.nodes} node{'s' if self.nodes > 1 else ''}"
        ranks = f"{self.ranks_per_node} rank{'s' if self.ranks_per_node > 1 else ''}"
        gpus = f", {self.gpus_per_node} GPUs per node" if self.gpus_per_node else ""
        return f"{nodes} x {ranks}{gpus}"


class JobFacts(TypedDict, total=False):
    """What a cluster kind records of its jobs."""

    name: str  # of the job in the queue
    said: str  # what the site printed
    host: str  # whose pid `job` is, with its pid namespace
    ticks: int | None  # start time of that process
    hosts: list[str]
    code: int | None  # where it ended within seconds


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One submission of a run."""

    number: int  # from 1
    kind: str  # local | mpi | slurm: cluster.kind
    job: str  # the cluster's name for it: a job id, or pid of the supervisor that stands for it
    host: str  # where it was submitted
    time: float
    nodes: int
    min_nodes: int
    ranks_per_node: int
    facts: Mapping[str, Any] = field(default_factory=dict)  # see JobFacts
