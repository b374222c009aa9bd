"""The plan of a run as one value for programs; plan_text writes it for people."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from lmscale.base.errors import Problem
from lmscale.config import rules as checks
from lmscale.config.identity import total_steps
from lmscale.config.model_spec import decoder_spec
from lmscale.config.schema import RunConfig
from lmscale.modelspec.activations import BYTES, MicroBatch, activation_bytes, smallest_budget
from lmscale.modelspec.parameters import num_elements, parameters, trainable
from lmscale.modelspec.spec import ModelSpec
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.planner import warnings
from lmscale_launcher.planner.data_plan import CorpusFacts, corpus_facts, node_facts
from lmscale_launcher.planner.memory_estimate import Memory, MeshSizes, checkpoint_bytes, memory_of
from lmscale_launcher.planner.planned_resume import PlannedResume, resume_point
from lmscale_launcher.planner.topology import (
    PlannedTopology,
    available_bytes,
    available_host_bytes,
    mesh_of,
    planned_topology,
)


def build_plan(cfg: RunConfig, env: Mapping[str, str]) -> dict[str, Any]:
    """The plan of a checked run file. Raises ConfigError where no start could run, and DataError."""
    from lmscale.corpus.order import wasted_frac

    topology, resume, corpus = planned_topology(cfg, env), resume_point(cfg), corpus_facts(cfg)
    spec = _spec(cfg, corpus.vocab_size)
    tensors = parameters(spec)
    train = cfg.train
    steps = _steps(cfg, resume, corpus)
    need = _memory(cfg, spec, topology, topology.mesh)
    plan = {
        "run_dir": str(train.run_dir),
        "stands_at": resume.step,
        "model": {
            "layers": cfg.model.num_layers,
            "width": cfg.model.hidden_size,
            "parameters": num_elements(tensors),
            "trainable": num_elements(trainable(tensors)),
        },
        **_length(cfg, resume, corpus, steps),
        "global_batch_samples": train.global_batch_size,
        "global_batch_tokens": train.global_batch_size * train.seq_len,
        **_ranks(topology),
        "engine": _engine(cfg),
        "micro_batch": train.micro_batch_size,
        "micro_batches": _micro_batches(cfg, topology.mesh),
        "wasted_frac": wasted_frac(
            train.global_batch_size, topology.mesh.dp, train.micro_batch_size
        ),
        **_corpus(corpus),
        "node_reads": (
            None if steps is None else node_facts(cfg, corpus, topology, resume, steps=steps)
        ),
        "checkpoints": _checkpoints(cfg, spec),
        "memory": {
            **asdict(need),
            "total": need.total,
            "room": available_bytes(topology, env, cfg),
            "host_room": available_host_bytes(topology, cfg),
        },
        "memory_at_min_nodes": _at_min_nodes(cfg, spec, topology),
    }
    problems = _warnings(cfg, plan, topology, spec)
    return {**plan, "warnings": [{"key": w.path, "fact": w.fact, "hint": w.hint} for w in problems]}


def _engine(cfg: RunConfig) -> dict[str, Any]:
    engine = cfg.engine
    return {
        "kind": engine.kind,
        "zero_stage": engine.zero_stage if engine.traits.uses_zero_stage else None,
        "precision": engine.precision,
        "offload": engine.offload,
        "activation_checkpointing": engine.activation_checkpointing,
        "sequence_parallel": cfg.parallel.sequence_parallel,
    }


def _ranks(topology: PlannedTopology) -> dict[str, Any]:
    return {
        "cluster": {
            "kind": topology.kind,
            "nodes": topology.nodes,
            "min_nodes": topology.min_nodes,
            "ranks_per_node": topology.ranks_per_node,
            "ranks_assumed": topology.assumed,
            "launch": topology.launch,
            "device": topology.device,
        },
        "ranks": topology.ranks,
        "dp_size": topology.mesh.dp,
        "mesh": asdict(topology.mesh),
    }


def _checkpoints(cfg: RunConfig, spec: ModelSpec) -> dict[str, Any]:
    size, cadence = checkpoint_bytes(spec, cfg.engine), cfg.checkpoint
    return {
        "bytes": size,
        "keep": cadence.keep,
        "bytes_on_disk": size * (cadence.keep + 1),  # one more while it is being written
        "every_steps": cadence.every_steps,
        "every_minutes": cadence.every_minutes,
    }


def _positions(cfg: RunConfig) -> int:
    return cfg.model.max_positions or cfg.train.seq_len


def _steps(cfg: RunConfig, resume: PlannedResume, corpus: CorpusFacts) -> int | None:
    """Steps of the whole run; None where they follow from a corpus that does not exist."""
    if cfg.train.epochs is not None and corpus.samples is None:
        return None
    return total_steps(cfg, lambda: corpus.samples or 0, step=resume.step, position=resume.position)


def _length(
    cfg: RunConfig, resume: PlannedResume, corpus: CorpusFacts, steps: int | None
) -> dict[str, Any]:
    from lmscale.corpus.schedule import step_start

    if steps is None:
        return {"steps": None, "tokens": None, "epochs": cfg.train.epochs}
    samples = sum(step_start(steps, resume.phases))  # where the last step ends
    epochs = None if corpus.samples is None else samples / corpus.samples
    return {"steps": steps, "tokens": samples * cfg.train.seq_len, "epochs": epochs}


def _corpus(corpus: CorpusFacts) -> dict[str, Any]:
    return {
        "corpus": corpus.path,
        "corpus_samples": corpus.samples,
        "corpus_tokens": corpus.tokens,
        "vocab_size": corpus.vocab_size,
        "vocab_from": corpus.vocab_from,
    }


def _micro_batches(cfg: RunConfig, mesh: MeshSizes) -> int:
    from lmscale.corpus.order import num_micro_batches

    return num_micro_batches(cfg.train.global_batch_size, mesh.dp, cfg.train.micro_batch_size)


def _memory(
    cfg: RunConfig,
    spec: ModelSpec,
    topology: PlannedTopology,
    mesh: MeshSizes,
) -> Memory:
    batch = _batch(cfg, topology)
    return memory_of(spec, cfg.engine, mesh, batch=batch, micro_batches=_micro_batches(cfg, mesh))


def _spec(cfg: RunConfig, vocab_size: int) -> ModelSpec:
    return decoder_spec(cfg.model, vocab_size=vocab_size, max_positions=_positions(cfg))


def _batch(cfg: RunConfig, topology: PlannedTopology) -> MicroBatch:
    return MicroBatch(
        device=topology.device,
        precision=cfg.engine.precision,
        rows=cfg.train.micro_batch_size,
        seq_len=cfg.train.seq_len,
        separate=cfg.data.documents == "separate",
        recompute=cfg.engine.activation_checkpointing,
        tp=topology.mesh.tp,
        sequence_parallel=cfg.parallel.sequence_parallel,
    )


def _at_min_nodes(cfg: RunConfig, spec: ModelSpec, topology: PlannedTopology) -> int | None:
    """Bytes per rank on min_nodes; None where those are all nodes, or cannot share the work."""
    ranks = topology.min_nodes * topology.ranks_per_node
    if topology.min_nodes == topology.nodes or list(checks.world_problems(cfg, world_size=ranks)):
        return None
    return _memory(cfg, spec, topology, mesh_of(cfg, ranks)).total


def _warnings(
    cfg: RunConfig, plan: Mapping[str, Any], topology: PlannedTopology, spec: ModelSpec
) -> Iterator[Problem]:
    cluster = cfg.cluster
    if topology.assumed:
        yield from warnings.unknown_ranks(topology.ranks_per_node)
    yield from warnings.tp_spans_nodes(topology.mesh.tp, topology.ranks_per_node)
    yield from warnings.refused_node_counts(cfg, topology.ranks_per_node)
    yield from warnings.fillers(plan["wasted_frac"], micro_batch=cfg.train.micro_batch_size)
    if (reads := plan["node_reads"]) is not None:
        yield from warnings.uneven_reading(
            topology.nodes, idle=reads["idle_nodes"], streams_stay=reads["streams_stay"]
        )
    if cfg.engine.traits.shards_parameters:
        in_blocks = num_elements(p for p in parameters(spec) if p.block)
        block = in_blocks // cfg.model.num_layers // topology.mesh.tp
        size = block * BYTES[cfg.engine.precision]
        yield from warnings.small_shards(size, shard=topology.mesh.shard, nodes=topology.nodes)
    yield from _memory_warnings(cfg, plan, topology, spec)
    yield from warnings.rare_checkpoints(
        cfg.checkpoint, seconds_per_step=_pace(cfg), time_limit=cluster.time_limit
    )
    if (lead_s := cluster.save_lead_s) is not None:
        yield from warnings.short_lead(
            plan["checkpoints"]["bytes"],
            nodes=topology.nodes,
            signal_lead=lead_s,
            time_limit=cluster.time_limit,
        )


def _memory_warnings(
    cfg: RunConfig, plan: Mapping[str, Any], topology: PlannedTopology, spec: ModelSpec
) -> Iterator[Problem]:
    need = Memory(**{name: plan["memory"][name] for name in Memory.__dataclass_fields__})
    yield from warnings.too_small_a_budget(
        cfg.engine.activation_checkpointing,
        smallest=smallest_budget(spec.stack("decoder"), _batch(cfg, topology)),
    )
    yield from warnings.too_much_memory(need, plan["memory"]["room"], cfg, nodes=topology.nodes)
    yield from warnings.too_much_on_the_host(
        need, plan["memory"]["host_room"], ranks_per_node=topology.ranks_per_node
    )
    yield from warnings.tokens_on_every_rank(
        cfg, need.total, saved=_split_saves(cfg, spec, topology)
    )
    yield from warnings.costly_fewer_nodes(
        need.total,
        plan["memory_at_min_nodes"],
        min_nodes=topology.min_nodes,
        available=plan["memory"]["room"],
    )


def _split_saves(cfg: RunConfig, spec: ModelSpec, topology: PlannedTopology) -> int:
    """Bytes of activations that sequence parallelism would save, where it is off."""
    batch = _batch(cfg, topology)
    split = replace(batch, sequence_parallel=True)
    return activation_bytes(spec, batch) - activation_bytes(spec, split)


def _pace(cfg: RunConfig) -> float | None:
    """Seconds per step in the last 20 steps; None for a run that has not trained yet."""
    from lmscale.base.records import newest_lines

    lines = newest_lines(RunFolder(Path(cfg.train.run_dir)).metrics, 20)
    found = (line.get("tokens_per_s") for line in lines)
    rates = [rate for rate in found if isinstance(rate, int | float) and rate > 0]
    return cfg.train.global_batch_size * cfg.train.seq_len / median(rates) if rates else None
