"""From a checked run file to a JobPlan, and RUN/jobs/K.json, the record of what was submitted where."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from lmscale.base.decoding import Limits, RecordError, convert, decode_file
from lmscale.base.errors import ConfigError, Problem
from lmscale.base.fs import UnsuitableFile, atomic_write, storage_errors
from lmscale.config import rules as checks
from lmscale.config.schema import RunConfig
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.job import JobFacts, JobPlan, JobRecord
from lmscale_launcher.clusters.kinds import cluster_of


def unstaged(cfg: RunConfig) -> list[Problem]:
    """Where data.cache_dir stays as it is: it is filled by a supervisor a node, which not every job has."""
    launcher = cluster_of(cfg.cluster.kind).rank_launcher(cfg.cluster)
    if cfg.data.cache_dir is None or launcher is None:
        return []
    fact = (
        f"nothing fills it with {launcher.setting}, which has no supervisor on each node: what is not "
        "there already is read from the corpus"
    )
    hint = f"use {launcher.alternative} to have it filled, or set it to null"
    return [Problem("data.cache_dir", fact, hint)]


def plan_job(cfg: RunConfig, *, number: int, cwd: Path, python: str = sys.executable) -> JobPlan:
    """The job of a checked run file. Raises ConfigError for what no number of its nodes could run."""
    cluster = cfg.cluster
    min_nodes = cluster.min_nodes or cluster.nodes
    ranks = cluster.ranks_per_node or cluster.gpus_per_node
    if ranks is None:
        from lmscale_launcher.gpus import count_gpus_here

        if not cluster_of(cluster.kind).nodes_are_like_this_host:
            fact = f"unknown for the nodes of kind {cluster.kind}"
            hint = "set one of cluster.ranks_per_node and cluster.gpus_per_node"
            raise ConfigError([Problem("cluster.ranks_per_node", fact, hint)])

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


_LIMITS = Limits(max_bytes=1 << 20)
_NAME = re.compile(r"([1-9]\d*)\.(?:json|yaml|sh|lib\.sh|chain|tries|end)")


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
        hint = "restore the file, or remove it if the job has ended"
        try:
            record = decode_file(JobRecord, path, limits=_LIMITS, hint=hint, closed=True)
            facts = convert(JobFacts, record.facts, where=path, hint=hint)
            if "ticks" in facts and not record.job.isdecimal():
                raise RecordError(f"{path}: job: {record.job[:20]!r} is not a pid; {hint}")
            found.append(record)
        except (RecordError, UnsuitableFile) as error:
            raise ConfigError(f"not the record of a job: {error}") from error
    return sorted(found, key=lambda record: record.number)


def newest_record(folder: RunFolder) -> JobRecord | None:
    """The newest submission, or None for a run that was only started by hand."""
    records = read_records(folder)
    return records[-1] if records else None
