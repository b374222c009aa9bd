"""`lmscale train RUN.yaml`: check what can be checked without torch, then supervise the ranks."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmscale.base.errors import ConfigError, ExitCode, LmscaleError, Problem, UsageError
from lmscale.base.fs import storage_errors
from lmscale.checks.corpus_checks import missing_corpora
from lmscale.checks.resume_checks import finished_message, finished_step
from lmscale.config import rules as checks
from lmscale.config.run_file import load
from lmscale.config.schema import RunConfig
from lmscale.run_folder.events import start_name
from lmscale.run_folder.liveness import wait_for_silence
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.command_line import train_command

if TYPE_CHECKING:
    from lmscale_launcher.supervisor.context import SupervisorJob


def train(source: str, overrides: Sequence[str], nproc: int | None) -> int:
    """Start the ranks of this host and supervise them until they end. Returns the exit code."""
    if nproc is not None:
        overrides = [*overrides, f"cluster.ranks_per_node={nproc}"]
    try:
        job = _job(source, overrides)
    except LmscaleError as error:
        if (nodes := _nodes_of(os.environ))[0] == 1:
            raise
        from lmscale_launcher.supervisor.supervisor import report_startup_error

        return report_startup_error(_placeholder_job(nodes, nproc or 1), error)
    if job.finished_message and job.topology.nodes == 1:
        sys.stderr.write(job.finished_message + "\n")
        return ExitCode.DONE
    from lmscale_launcher.supervisor.supervisor import supervise

    return supervise(job)


def _job(source: str, overrides: Sequence[str]) -> "SupervisorJob":
    """The job to supervise. Raises ConfigError for every error that can be found without torch."""
    cfg = load(source, overrides)
    num_ranks, nodes, node, master = world_of(cfg, os.environ)
    if found := [*checks.world_problems(cfg, world_size=num_ranks * nodes), *missing_corpora(cfg)]:
        raise ConfigError(found)
    folder, by_hand = RunFolder(Path(cfg.train.run_dir)), "LMSCALE_START" not in os.environ
    if by_hand:
        wait_for_silence(folder)  # before signals are caught, so that Ctrl-C ends the wait at once
    # Node 0 judges for all: others may see an older state of a shared folder.
    step = finished_step(cfg, folder) if node == 0 else None
    staging = None
    if cfg.data.cache_dir is not None:
        from lmscale_launcher import stage

        staging = stage.command(
            source, overrides=overrides, node=node, nodes=nodes, ranks_per_node=num_ranks
        )
    from lmscale_launcher.supervisor.context import SupervisorJob
    from lmscale_launcher.supervisor.rank_process import NodeTopology
    from lmscale_launcher.supervisor.stall import StallLimits

    return SupervisorJob(
        command=train_command(source, overrides),
        folder=folder,
        topology=NodeTopology(num_ranks, nodes, node, master),
        start=start_name(os.environ),
        by_hand=by_hand,
        max_restarts=cfg.cluster.max_restarts,
        env={**os.environ, **cfg.cluster.env},
        fresh=os.environ.get("LMSCALE_FRESH") == "1",
        deadline=_deadline(os.environ),
        stage=staging,
        unhealthy=() if by_hand else _node_failures(folder, node=node, ranks=num_ranks),
        finished_message="" if step is None else finished_message(folder, step),
        stall_limits=StallLimits(cfg.cluster.stall_limit, min_s=_min_stall_s(cfg)),
    )


def _placeholder_job(nodes: tuple[int, int, str | None], num_ranks: int) -> "SupervisorJob":
    """A job without a run, by which the other nodes receive an error of the run file."""
    from lmscale_launcher.supervisor.context import SupervisorJob
    from lmscale_launcher.supervisor.rank_process import NodeTopology

    return SupervisorJob(
        command=(),
        folder=RunFolder(Path()),
        topology=NodeTopology(num_ranks, *nodes),
        start=start_name(os.environ),
        by_hand=False,
        max_restarts=0,
        env=os.environ,
    )


def _min_stall_s(cfg: RunConfig) -> float:
    # A compiler may run again at any step, when shapes or modes change.
    return 600.0 if cfg.engine.compile else 30.0


def _deadline(env: Mapping[str, str]) -> float | None:
    text = env.get("LMSCALE_DEADLINE")
    try:
        return float(text) if text else None
    except ValueError as error:
        raise UsageError(
            f"environment: LMSCALE_DEADLINE={text!r} is not a time in seconds since 1970; let the job script set it"
        ) from error


def _node_failures(folder: RunFolder, *, node: int, ranks: int) -> list[str]:
    """Why this node should not train. Warnings are printed on node 0 only."""
    from lmscale_launcher.doctor.node import check_node

    # A start that was not submitted makes its folder here; on a host without the file system of a submitted
    # one, not even the run file could be read.
    with storage_errors(f"making {folder.path}"):
        folder.path.mkdir(parents=True, exist_ok=True)
    findings = check_node(folder, ranks=ranks)
    for finding in findings:
        if finding.level == "warn" and node == 0:
            sys.stderr.write(f"warning: {finding}\n")
    return [str(finding) for finding in findings if finding.level == "fail"]


def world_of(cfg: RunConfig, env: Mapping[str, str]) -> tuple[int, int, int, str | None]:
    """Ranks on this host, number of hosts, number of this host, and the address of node 0's supervisor."""
    num_ranks = cfg.cluster.ranks_per_node
    if num_ranks is None:
        from lmscale_launcher.gpus import count_gpus

        num_ranks = count_gpus(env) or 2
    nodes, node, master = _nodes_of(env)
    max_nodes = cfg.cluster.nodes
    min_nodes = min(cfg.cluster.min_nodes or max_nodes, max_nodes)
    if not min_nodes <= nodes <= max_nodes:
        allowed = str(max_nodes) if min_nodes == max_nodes else f"{min_nodes} to {max_nodes}"
        fact = f"{allowed}, but this start has {nodes} (LMSCALE_NODES)"
        hint = "start it on every node with LMSCALE_NODES set, or use cluster.nodes=1"
        raise ConfigError([Problem("cluster.nodes", fact, hint)])
    return num_ranks, nodes, node, master


def _nodes_of(env: Mapping[str, str]) -> tuple[int, int, str | None]:
    """Number of hosts, number of this host, and the address of node 0's supervisor. Raises UsageError."""
    given = {name: env.get(name) for name in ("LMSCALE_NODES", "LMSCALE_NODE_RANK")}
    if any(text is not None and not text.isdecimal() for text in given.values()):
        raise UsageError(
            f"LMSCALE_NODES and LMSCALE_NODE_RANK must be whole numbers, got {given}. Unset them, or let the "
            "job script set them"
        )
    nodes = int(given["LMSCALE_NODES"] or 1)
    node = int(given["LMSCALE_NODE_RANK"] or 0)
    master = env.get("LMSCALE_MASTER")
    port = (master or "").rpartition(":")[2]
    if node >= nodes or (nodes > 1 and not (":" in (master or "") and port.isdecimal())):
        raise UsageError(
            f"environment: node {node} of {nodes} with LMSCALE_MASTER={master!r}; "
            "every node needs LMSCALE_NODES, LMSCALE_NODE_RANK and LMSCALE_MASTER=host:port"
        )
    if nodes > 1 and not env.get("LMSCALE_START"):
        raise UsageError(
            f"environment: {nodes} nodes need LMSCALE_START, a name of this start that is the same on "
            "every node and different for each start, e.g. job id and restart count"
        )
    return nodes, node, master
