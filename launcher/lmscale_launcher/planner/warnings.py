"""Settings that are allowed but costly or risky: one pure function per warning (key, fact, next action)."""

from collections.abc import Iterator

from lmscale.base.errors import Problem
from lmscale.base.units import show_bytes, show_seconds
from lmscale.config import rules as checks
from lmscale.config.schema import CheckpointConfig, RunConfig
from lmscale_launcher.planner.memory_estimate import Memory

# Of the memory of a rank; the rest is for CUDA, NCCL and fragmentation of the allocator. Not measured.
USABLE_FRAC = 0.9
# Bytes per rank of an all-gather, below which latency limits it instead of bandwidth. A rule of thumb.
_SMALL_GATHER = 1 << 19
_MANY_NODES = 4
# Of one node: 50M parameters and their moments, 0.6 GB, were saved by two processes in 0.7 to 1.1 s; a low value, so
# that the warning is early.
_SAVE_BYTES_PER_S = 5e8
_MUCH_WASTE = 0.1
_MIN_SAVING = 0.05  # of a rank's memory


def tp_spans_nodes(tp: int, ranks_per_node: int) -> Iterator[Problem]:
    """Tensor-parallel ranks communicate several times per layer: between nodes this limits the speed."""
    if tp > ranks_per_node:
        fact = f"{tp} ranks share each layer, but a node has {ranks_per_node}: they span nodes"
        yield Problem("parallel.tp", fact, f"use at most {ranks_per_node}")
    elif ranks_per_node % tp:
        fact = f"{tp} does not divide the {ranks_per_node} ranks of a node: some groups span nodes"
        yield Problem("parallel.tp", fact, "use a divisor of cluster.ranks_per_node")


def unknown_ranks(ranks_per_node: int) -> Iterator[Problem]:
    """The nodes of a cluster cannot be checked from this host, and `lmscale submit` does not guess."""
    fact = f"unknown for slurm's nodes; this plan assumes {ranks_per_node}, and submit will refuse"
    hint = "set one of cluster.ranks_per_node and cluster.gpus_per_node"
    yield Problem("cluster.ranks_per_node", fact, hint)


def refused_node_counts(cfg: RunConfig, ranks_per_node: int) -> Iterator[Problem]:
    """Numbers of nodes between min_nodes and nodes with which a start would be refused."""
    min_nodes = cfg.cluster.min_nodes or cfg.cluster.nodes
    refused = {
        nodes: problem
        for nodes in range(min_nodes, cfg.cluster.nodes)
        for problem in checks.world_problems(cfg, world_size=nodes * ranks_per_node)
    }
    if refused:
        first = min(refused)
        more = f" (and with {len(refused) - 1} other numbers of nodes)" if len(refused) > 1 else ""
        fact = f"with {first} nodes{more} a start is refused: {refused[first].fact}"
        yield Problem("cluster.min_nodes", fact, refused[first].hint)


def fillers(wasted_frac: float, *, micro_batch: int) -> Iterator[Problem]:
    """Rows that are computed and masked."""
    if wasted_frac > _MUCH_WASTE:
        fact = f"{micro_batch}: {100 * wasted_frac:.0f} % of the rows that are computed are fillers"
        hint = "let micro_batch x data-parallel ranks divide train.global_batch_size"
        yield Problem("train.micro_batch_size", fact, hint)


def uneven_reading(nodes: int, *, idle: int, streams_stay: bool) -> Iterator[Problem]:
    """Nodes that read nothing, or streams that change nodes, so that every node reads most chunks."""
    if idle:
        fact = f"{idle} of {nodes} nodes read nothing"
        yield Problem("cluster.nodes", fact, "use fewer nodes, or a larger train.global_batch_size")
    elif nodes > 1 and not streams_stay:
        fact = "streams change from node to node, so most chunks are read by several of them"
        hint = "let the nodes divide train.global_batch_size, and data.streams divide it or be a multiple"
        yield Problem("cluster.nodes", fact, hint)


def small_shards(block_bytes: int, *, shard: int, nodes: int) -> Iterator[Problem]:
    """FSDP gathers each block over all shard ranks: with tiny pieces the latency of the network dominates."""
    piece = block_bytes // shard
    if nodes >= _MANY_NODES and piece < _SMALL_GATHER:
        fact = f"{shard} ranks on {nodes} nodes gather each block in pieces of {show_bytes(piece)}"
        hint = "latency will limit the speed: use fewer nodes, or engine.kind=ddp if it fits on one rank"
        yield Problem("parallel.dp_shard", fact, hint)


def too_much_memory(
    need: Memory, available: int | None, cfg: RunConfig, *, nodes: int
) -> Iterator[Problem]:
    """More memory than a rank has, with settings that need less."""
    if available is None or need.total <= USABLE_FRAC * available:
        return
    fact = (
        f"on {nodes} node{'s' if nodes > 1 else ''} a rank needs about {show_bytes(need.total)}, more than "
        f"{100 * USABLE_FRAC:.0f} % of the {show_bytes(available)} that it has"
    )
    yield Problem("memory", fact, "; or ".join(_smaller_settings(need, cfg)))


def costly_fewer_nodes(
    total: int, bytes_at_min_nodes: int | None, *, min_nodes: int, available: int | None
) -> Iterator[Problem]:
    """A restart on fewer nodes that would run out of memory: each rank has a larger part of the state then."""
    if bytes_at_min_nodes is None or bytes_at_min_nodes <= (
        2 * total if available is None else USABLE_FRAC * available
    ):
        return
    fact = (
        f"with {min_nodes} a rank needs about {show_bytes(bytes_at_min_nodes)} instead of {show_bytes(total)}: "
        "fewer ranks share the state"
    )
    hint = "raise it, or plan for that number: engine.activation_checkpointing and engine.offload need less"
    yield Problem("cluster.min_nodes", fact, hint)


def too_small_a_budget(recompute: str, *, smallest: float) -> Iterator[Problem]:
    """A budget below the inputs of the blocks, which full recomputation keeps, too: the start is refused."""
    kind, _, share = recompute.partition(":")
    if kind == "budget" and float(share) < smallest:
        fact = f"{recompute}, but full recomputation keeps {smallest:.1%} of the activations"
        yield Problem("engine.activation_checkpointing", fact, "use full, or a larger fraction")


def too_much_on_the_host(
    need: Memory, available: int | None, *, ranks_per_node: int
) -> Iterator[Problem]:
    """More offloaded state than the memory of the host has."""
    if available is None or need.host <= USABLE_FRAC * available:
        return
    node = ranks_per_node * need.host
    fact = (
        f"{show_bytes(need.host)} per rank are moved to the host, {show_bytes(node)} per node, which has "
        f"{show_bytes(ranks_per_node * available)}"
    )
    yield Problem("engine.offload", fact, "use more ranks on more nodes, or offload less")


def tokens_on_every_rank(cfg: RunConfig, total: int, *, saved: int) -> Iterator[Problem]:
    """Without sequence parallelism every tp rank normalizes, and keeps, all tokens."""
    parallel = cfg.parallel
    if parallel.tp == 1 or parallel.sequence_parallel or saved < _MIN_SAVING * total:
        return
    fact = (
        f"false: between the layers each of {parallel.tp} tp ranks keeps all tokens, "
        f"{show_bytes(saved)} more than a share of them"
    )
    fits = cfg.train.seq_len % parallel.tp == 0
    hint = "set it to true: the same losses, the same traffic"
    if not fits:
        hint = f"set it to true, with a train.seq_len that {parallel.tp} divides"
    yield Problem("parallel.sequence_parallel", fact, hint)


def _smaller_settings(need: Memory, cfg: RunConfig) -> Iterator[str]:
    """Settings that need less memory, for the largest part first. None of them changes the losses."""
    train, engine = cfg.train, cfg.engine
    transient = need.activations + need.loss
    if transient > 0.1 * need.total:
        if engine.activation_checkpointing == "none":
            yield "engine.activation_checkpointing=selective"
        if engine.activation_checkpointing != "full":
            yield "engine.activation_checkpointing=full"
        if cfg.parallel.tp > 1 and not cfg.parallel.sequence_parallel:
            yield "parallel.sequence_parallel=true"
        if train.micro_batch_size > 1:
            yield f"train.micro_batch_size={train.micro_batch_size // 2}"
    traits = engine.traits
    if not traits.splits_state:
        yield "engine.kind=fsdp"
    if traits.uses_zero_stage and engine.zero_stage < 3:
        yield "engine.zero_stage=3"
    if need.optimizer > 0.3 * need.total and engine.offload == "none" and traits.splits_state:
        yield f"engine.offload={'all' if traits.shards_parameters else 'optimizer'}"
    if engine.precision == "fp32":
        yield "engine.precision=bf16"
    yield "more ranks (cluster.nodes, --nproc)" if traits.splits_state else "a smaller model"


def rare_checkpoints(
    cadence: CheckpointConfig, *, seconds_per_step: float | None, time_limit: int | None
) -> Iterator[Problem]:
    """Checkpoints that would be due only after the job has ended."""
    intervals = []
    if cadence.every_minutes is not None:
        intervals.append(60 * cadence.every_minutes)
    if cadence.every_steps is not None and seconds_per_step is not None:
        intervals.append(cadence.every_steps * seconds_per_step)
    hint = "set checkpoint.every_minutes, e.g. 20"
    if cadence.every_steps is None and cadence.every_minutes is None:
        fact = "null, as every_steps: the failure of a node loses all steps since the start"
        yield Problem("checkpoint.every_minutes", fact, hint)
    elif time_limit is not None and intervals and min(intervals) > time_limit:
        fact = (
            f"one is due every {show_seconds(min(intervals))}, but a job lasts "
            f"{show_seconds(time_limit)}: only the save requested before the limit would be made, and where "
            "it fails the whole job is lost"
        )
        yield Problem("checkpoint", fact, hint)


def short_lead(
    checkpoint_bytes: int, *, nodes: int, signal_lead: int, time_limit: int | None
) -> Iterator[Problem]:
    """Less time between the signal and the time limit than a save takes."""
    seconds = checkpoint_bytes / (_SAVE_BYTES_PER_S * nodes)
    if time_limit is not None and seconds > signal_lead:
        fact = (
            f"{signal_lead} s before the time limit, but a checkpoint of "
            f"{show_bytes(checkpoint_bytes)} takes about {show_seconds(seconds)} to write"
        )
        hint = f"raise it to {round(2 * seconds)} or more"
        yield Problem("cluster.slurm.signal_lead", fact, hint)
