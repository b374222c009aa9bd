"""The planned ranks of a run and the memory available to them, from the run file and this host."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmscale.base.errors import ConfigError
from lmscale.config import rules as checks
from lmscale.config.schema import RunConfig
from lmscale.modelspec.activations import Device
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.gpus import count_gpus
from lmscale_launcher.planner.memory_estimate import MeshSizes

ASSUMED_RANKS = 8  # per node, where no key gives a number: most GPU nodes have eight GPUs
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class PlannedTopology:
    """The nodes and ranks of a start."""

    kind: str  # cluster.kind
    nodes: int
    min_nodes: int
    ranks_per_node: int
    assumed: bool  # no key gives the number of ranks per node
    launch: str | None  # tasks that the cluster starts: one per "node" or one per "rank"
    device: Device
    mesh: MeshSizes

    @property
    def ranks(self) -> int:
        """Number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node


def planned_topology(cfg: RunConfig, env: Mapping[str, str]) -> PlannedTopology:
    """The ranks of a start on all of its nodes. Raises ConfigError for ranks that cannot share the work."""
    cluster = cfg.cluster
    kind = cluster_of(cluster.kind)
    here = kind.nodes_are_like_this_host  # a plan is made on any machine
    gpus = count_gpus(env) if here and cluster.gpus_per_node is None else cluster.gpus_per_node
    ranks = cluster.ranks_per_node or gpus or (2 if here else None)
    ranks_per_node = ranks or ASSUMED_RANKS
    if problems := list(checks.world_problems(cfg, world_size=cluster.nodes * ranks_per_node)):
        raise ConfigError(problems)
    # A job that requests no GPU has none, unless its nodes come with all their GPUs.
    device: Device = "cpu"
    if gpus or ranks is None or (gpus is None and kind.has_gpus_by_default(cluster)):
        device = "cuda"
    return PlannedTopology(
        kind=cluster.kind,
        nodes=cluster.nodes,
        min_nodes=cluster.min_nodes or cluster.nodes,
        ranks_per_node=ranks_per_node,
        assumed=ranks is None,
        launch=kind.launch_mode(cluster),
        device=device,
        mesh=mesh_of(cfg, cluster.nodes * ranks_per_node),
    )


def mesh_of(cfg: RunConfig, ranks: int) -> MeshSizes:
    """The mesh of this many ranks. ddp replicates over all of them, ZeRO shards over all."""
    tp = cfg.parallel.tp
    if not cfg.engine.traits.splits_state:
        return MeshSizes(ranks // tp, 1, tp)
    return MeshSizes(cfg.parallel.dp_replicate, checks.shard_size(cfg, world_size=ranks), tp)


def available_bytes(
    topology: PlannedTopology, env: Mapping[str, str], cfg: RunConfig
) -> int | None:
    """Bytes available to one rank: of this host's smallest GPU, or its share of this host's memory.

    None where the ranks will be on other machines, or where the size is unknown.
    """
    if not cluster_of(topology.kind).runs_on_this_host_only(cfg.cluster):
        return None
    if topology.device == "cuda":
        return _gpu_bytes(env)
    return _host_bytes() // topology.ranks_per_node


def available_host_bytes(topology: PlannedTopology, cfg: RunConfig) -> int | None:
    """Bytes of host memory that one rank may use for offloading; None where the host is unknown."""
    if not cluster_of(topology.kind).runs_on_this_host_only(cfg.cluster):
        return None
    return _host_bytes() // topology.ranks_per_node


def _gpu_bytes(env: Mapping[str, str]) -> int | None:
    from lmscale_launcher.doctor.command_result import run_command

    argv = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = run_command(argv, timeout_s=20, env=env)
    sizes = [int(line) << 20 for line in answer.out.split() if line.isdecimal()]
    return min(sizes) if answer.succeeded and sizes else None


def _host_bytes(*, cgroup: Path = _CGROUP) -> int:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(size, int(cgroup.read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return size
