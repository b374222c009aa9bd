"""A job as one value: everything that any kind of cluster needs to know to start it. Pure.

RUN/jobs/K.json: what was submitted where. All that a later `status`, `logs` or `stop` goes by.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmscale.base.errors import ConfigError, Problem
from lmscale.base.fs import atomic_write, storage_errors
from lmscale.config import rules as checks
from lmscale.config.cluster_schema import ClusterConfig
from lmscale.config.schema import RunConfig
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
    gpus_per_node: int  # 0: none are asked for
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
        gpus = f", {self.gpus_per_node} GPUs a node" if self.gpus_per_node else ""
        return f"{nodes} x {ranks}{gpus}"


def unstaged(cfg: RunConfig) -> list[Problem]:
    """Where data.cache_dir stays as it is: it is filled by a supervisor a node, which not every job has."""
    by_ranks = cfg.cluster.kind == "slurm" and cfg.cluster.slurm.launch == "rank"
    if cfg.data.cache_dir is None or not (by_ranks or cfg.cluster.kind == "mpi"):
        return []
    starter = "cluster.slurm.launch=rank" if by_ranks else "cluster.kind mpi"
    fact = (
        f"nothing fills it with {starter}, which has no supervisor on each node: what is not there "
        "already is read from the corpus"
    )
    instead = "cluster.slurm.launch=node" if by_ranks else "kind slurm or local"
    return [Problem("data.cache_dir", fact, f"use {instead} to have it filled, or set it to null")]


def plan_job(cfg: RunConfig, *, number: int, cwd: Path, python: str = sys.executable) -> JobPlan:
    """The job of a checked run file. Raises ConfigError for what no number of its nodes could run."""
    cluster = cfg.cluster
    min_nodes = cluster.min_nodes or cluster.nodes
    ranks = cluster.ranks_per_node or cluster.gpus_per_node
    if ranks is None:
        if cluster.kind == "slurm":  # its nodes cannot be looked at from here
            hint = "set one of cluster.ranks_per_node and cluster.gpus_per_node"
            raise ConfigError(
                [Problem("cluster.ranks_per_node", "unknown for slurm's nodes", hint)]
            )
        from lmscale_launcher.gpus import count_gpus_here

        ranks = count_gpus_here() or 2
    found = [
        Problem(one.path, f"with {nodes} of the {min_nodes} to {cluster.nodes} nodes: {one.fact}", one.hint)
        for nodes in range(min_nodes, cluster.nodes + 1)
        for one in checks.world_problems(cfg, world_size=nodes * ranks)
    ]  # fmt: skip
    if found:
        raise ConfigError(found[:1])
    run_dir = Path(cfg.train.run_dir)
    paths = [*(one.path for one in cfg.data.corpora), *cfg.eval.corpora]
    paths += [path for path in (cfg.data.tokenizer, cfg.data.cache_dir) if path is not None]
    if cfg.train.resume not in ("auto", "never"):
        paths.append(cfg.train.resume)
    return JobPlan(
        name=run_dir.name,
        run_dir=run_dir,
        number=number,
        nodes=cluster.nodes,
        min_nodes=min_nodes,
        ranks_per_node=ranks,
        gpus_per_node=cluster.gpus_per_node or 0,
        workdir=cwd,
        python=python,
        cluster=cluster,
        paths=tuple(dict.fromkeys(Path(path) for path in paths)),
    )


_NAME = re.compile(r"([1-9]\d*)\.(?:json|yaml|sh|chain|tries)")


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
    facts: Mapping[str, Any] = field(default_factory=dict)  # of its kind: ticks of a pid, ...


def next_number(folder: RunFolder) -> int:
    """The number of the next submission, beyond every file of an earlier one."""
    names = folder.jobs.iterdir() if folder.jobs.is_dir() else ()
    return 1 + max((int(m[1]) for m in (_NAME.fullmatch(p.name) for p in names) if m), default=0)


def write_record(folder: RunFolder, record: JobRecord) -> None:
    """Write or replace a record."""
    path = folder.jobs / f"{record.number}.json"
    with storage_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, (json.dumps(asdict(record), indent=1) + "\n").encode())


def read_records(folder: RunFolder) -> list[JobRecord]:
    """All submissions of a run, oldest first. Raises ConfigError for a file that makes no sense."""
    found = []
    for path in folder.jobs.glob("*.json") if folder.jobs.is_dir() else ():
        if not _NAME.fullmatch(path.name):
            continue
        try:
            found.append(JobRecord(**json.loads(path.read_text())))
        except (ValueError, TypeError) as error:
            hint = "restore the file, or remove it if the job has ended"
            raise ConfigError(
                [Problem("", f"{path} is no record of a job ({error})", hint)]
            ) from error
    return sorted(found, key=lambda record: record.number)


def newest_record(folder: RunFolder) -> JobRecord | None:
    """The newest submission, or None for a run that was only started by hand."""
    records = read_records(folder)
    return records[-1] if records else None
