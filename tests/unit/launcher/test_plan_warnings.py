"""Each warning: silent where all is well, and in words where it is not."""

from collections.abc import Iterable

import pytest

from lmscale.base.errors import Problem
from lmscale.config.run_file import load
from lmscale.config.schema import CheckpointConfig, RunConfig
from lmscale_launcher.planner import warnings
from lmscale_launcher.planner.memory_estimate import Memory

GIB = 1 << 30


def config(*overrides: str) -> RunConfig:
    return load("smoke", list(overrides))


def only(found: Iterable[Problem]) -> str:
    (one,) = found
    assert one.path
    assert one.hint
    return f"{one.path}: {one.fact} ({one.hint})"


def memory(**parts: int) -> Memory:
    return Memory(**{name: parts.get(name, 0) for name in Memory.__dataclass_fields__})


def test_tensor_parallel_groups_stay_inside_a_node() -> None:
    assert not list(warnings.tp_spans_nodes(1, 8))
    assert not list(warnings.tp_spans_nodes(8, 8))
    assert "they span nodes" in only(warnings.tp_spans_nodes(16, 8))
    assert "some groups span nodes" in only(warnings.tp_spans_nodes(4, 6))


def test_every_number_of_nodes_must_fit_the_batch() -> None:
    fits = config("cluster.nodes=4", "cluster.min_nodes=1", "train.global_batch_size=8")
    assert not list(warnings.refused_node_counts(fits, 2))
    fixed = config(
        "cluster.nodes=4", "cluster.min_nodes=1", "train.global_batch_size=8", "parallel.dp_shard=8"
    )
    said = only(warnings.refused_node_counts(fixed, 2))
    assert "with 1 nodes (and with 2 other numbers" in said
    assert "shard 8" in said


def test_ranks_of_slurms_nodes_cannot_be_guessed() -> None:
    assert "gpus_per_node" in only(warnings.unknown_ranks(8))


def test_fillers_cost() -> None:
    assert not list(warnings.fillers(0.05, micro_batch=3))
    assert "33 %" in only(warnings.fillers(1 / 3, micro_batch=3))


def test_nodes_that_read_nothing_or_everything() -> None:
    assert not list(warnings.uneven_reading(4, idle=0, streams_stay=True))
    assert not list(warnings.uneven_reading(1, idle=0, streams_stay=False))
    assert "2 of 4 nodes read nothing" in only(
        warnings.uneven_reading(4, idle=2, streams_stay=True)
    )
    assert "several of them" in only(warnings.uneven_reading(4, idle=0, streams_stay=False))


def test_small_shards_over_a_network() -> None:
    assert not list(warnings.small_shards(1 << 20, shard=512, nodes=1))
    assert not list(warnings.small_shards(1 << 30, shard=512, nodes=64))
    assert "64 nodes" in only(warnings.small_shards(1 << 20, shard=512, nodes=64))


@pytest.mark.parametrize(
    ("need", "overrides", "lever"),
    [
        (memory(activations=80 * GIB), ["train.micro_batch_size=4"], "train.micro_batch_size=2"),
        (memory(activations=80 * GIB), [], "activation_checkpointing=full"),
        (memory(activations=80 * GIB), [], "engine.activation_checkpointing=selective"),
        (memory(optimizer=80 * GIB), ["engine.kind=ddp"], "engine.kind=fsdp"),
        (memory(optimizer=80 * GIB), [], "engine.offload=all"),
        (memory(optimizer=80 * GIB), ["engine.kind=deepspeed"], "engine.offload=optimizer"),
        (memory(parameters=80 * GIB), ["engine.kind=deepspeed"], "engine.zero_stage=3"),
        (
            memory(activations=80 * GIB),
            ["parallel.tp=2"],
            "parallel.sequence_parallel=true",
        ),
        (memory(optimizer=80 * GIB), [], "engine.precision=bf16"),
    ],
)
def test_too_much_memory_names_what_needs_less(
    need: Memory, overrides: list[str], lever: str
) -> None:
    cfg = config(*overrides)
    said = only(warnings.too_much_memory(need, 80 * GIB, cfg, nodes=1))
    assert "80 GiB" in said
    assert lever in said
    assert not list(warnings.too_much_memory(need, 100 * GIB, cfg, nodes=1))
    assert not list(warnings.too_much_memory(need, None, cfg, nodes=1))


def test_levers_that_would_not_help_are_not_named() -> None:
    cfg = config("engine.precision=bf16", "train.micro_batch_size=1")
    need = memory(parameters=80 * GIB)
    said = only(warnings.too_much_memory(need, 80 * GIB, cfg, nodes=1))
    assert "more ranks" in said
    for lever in ("checkpointing", "micro", "bf16", "fsdp", "offload", "zero", "sequence"):
        assert lever not in said


def test_a_budget_that_no_recomputation_meets() -> None:
    assert not list(warnings.too_small_a_budget("budget:0.1", smallest=0.09))
    assert not list(warnings.too_small_a_budget("every:2", smallest=0.09))
    assert "keeps 9.0%" in only(warnings.too_small_a_budget("budget:0.05", smallest=0.09))


def test_what_is_offloaded_must_fit_the_host() -> None:
    need = memory(host=40 * GIB)
    assert not list(warnings.too_much_on_the_host(need, None, ranks_per_node=8))
    assert not list(warnings.too_much_on_the_host(need, 50 * GIB, ranks_per_node=8))
    assert "320 GiB per node" in only(
        warnings.too_much_on_the_host(need, 32 * GIB, ranks_per_node=8)
    )


def test_tokens_that_every_tensor_parallel_rank_keeps() -> None:
    tp = ("parallel.tp=2",)

    def found(*overrides: str, saved: int = GIB) -> list[Problem]:
        return list(warnings.tokens_on_every_rank(config(*overrides), 10 * GIB, saved=saved))

    assert not found()
    assert not found(*tp, saved=GIB >> 4)
    assert not found(*tp, "parallel.sequence_parallel=true")
    assert "1 GiB more" in only(found(*tp))
    assert "that 2 divides" in only(found(*tp, "train.seq_len=255"))


def test_fewer_nodes_that_need_far_more_memory() -> None:
    def found(room: int | None, at_least: int | None) -> list[Problem]:
        return list(warnings.costly_fewer_nodes(20 * GIB, at_least, min_nodes=2, available=room))

    assert not found(None, None)
    assert not found(None, 40 * GIB)
    assert not found(80 * GIB, 60 * GIB)
    assert "60 GiB instead of 20 GiB" in only(found(None, 60 * GIB))
    assert found(80 * GIB, 75 * GIB)


def test_checkpoints_that_come_after_the_end() -> None:
    def found(seconds_a_step: float | None, limit: int | None, **keys: object) -> list[Problem]:
        return list(
            warnings.rare_checkpoints(
                CheckpointConfig(**keys), seconds_per_step=seconds_a_step, time_limit=limit
            )
        )

    assert not found(None, 3600, every_steps=1000)  # who knows how long a step takes
    assert not found(1.0, 3600, every_steps=1000)
    assert not found(1.0, None, every_steps=5000)
    assert not found(9.0, 3600, every_steps=5000, every_minutes=20)
    assert "every 1h23m" in only(found(1.0, 3600, every_steps=5000))
    assert "every 1h30m" in only(found(None, 3600, every_steps=1000, every_minutes=90))
    assert "all steps" in only(found(None, None, every_steps=None))


def test_a_lead_that_is_shorter_than_a_save() -> None:
    def found(size: int, nodes: int, limit: int | None = 3600) -> list[Problem]:
        return list(warnings.short_lead(size, nodes=nodes, signal_lead=180, time_limit=limit))

    assert not found(GIB, 1)
    assert not found(800 * GIB, 64)
    assert not found(800 * GIB, 1, limit=None)
    assert "800 GiB takes about 28m" in only(found(800 * GIB, 1))
