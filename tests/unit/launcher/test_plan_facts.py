"""The whole plan, on a machine without the corpus, the cluster or its GPUs; and its words on a terminal."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lmscale.base.errors import ConfigError
from lmscale.config.run_file import load
from lmscale_launcher.planner import topology as places
from lmscale_launcher.planner.data_plan import ASSUMED_VOCAB
from lmscale_launcher.planner.facts import build_plan
from lmscale_launcher.planner.plan_text import as_json, plan_lines

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SLURM = ["cluster.kind=slurm", "cluster.nodes=64"]
LARGE = [
    "model=llama-70b", "train.seq_len=4096", "train.global_batch_size=1024", "train.micro_batch_size=2",
    "engine.precision=bf16", "engine.activation_checkpointing=full",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(*overrides: str, env: dict[str, str] = NO_GPU) -> dict[str, Any]:
    return build_plan(load("smoke", list(overrides)), env)


def words(found: dict[str, Any]) -> str:
    lines = list(plan_lines(found))
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)
    assert all(line == line.rstrip() for line in lines)
    return "\n".join(lines)


def test_a_model_can_be_planned_before_there_is_a_corpus() -> None:
    found = plan("model=llama-7b")
    assert found["model"]["parameters"] == 6_738_415_616
    assert (found["vocab_size"], found["vocab_from"]) == (ASSUMED_VOCAB, "assumed")
    assert found["corpus_samples"] is found["epochs"] is found["node_reads"] is None
    assert found["steps"] == 500
    said = words(found)
    assert "lmscale prepare" in said
    assert "assumed" in said
    given = plan("model.vocab_size=50257")
    assert (given["vocab_size"], given["vocab_from"]) == (50257, "model.vocab_size")
    unknown = plan("train.steps=null", "train.epochs=3")
    assert unknown["steps"] is unknown["tokens"] is None
    assert "3 epochs" in words(unknown)


def test_a_slurm_job_is_planned_on_a_laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan of other machines asks nothing of this one")

    monkeypatch.setattr(subprocess, "run", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    found = plan(*SLURM, *LARGE, "cluster.gpus_per_node=8", env={})
    assert (found["ranks"], found["mesh"]) == (512, {"replicate": 1, "shard": 512, "tp": 1})
    assert found["cluster"]["device"] == "cuda"
    assert found["memory"]["room"] is None
    parts = ("parameters", "gradients", "optimizer", "activations", "loss", "working")
    assert found["memory"]["total"] == sum(found["memory"][part] for part in parts)
    assert found["memory"]["host_room"] is None
    # 68.98e9 fp32 weights and two moments over 512 ranks, give or take a row of each matrix.
    assert found["memory"]["parameters"] == pytest.approx(68_976_648_192 * 4 / 512, rel=1e-3)
    assert found["checkpoints"]["bytes"] == 68_976_648_192 * 12
    assert json.loads(as_json(found)) == found
    said = words(found)
    assert "512 GPU ranks: slurm, 64 nodes x 8; one task per node" in said
    assert not found["warnings"]


def test_ranks_that_nobody_named_are_assumed_aloud() -> None:
    found = plan(*SLURM, *LARGE)
    assert found["cluster"]["ranks_assumed"]
    assert [one["key"] for one in found["warnings"]] == ["cluster.ranks_per_node"]
    assert "submit will refuse" in words(found)


def test_a_slurm_job_that_asks_for_no_gpu_has_none() -> None:
    asks = ["cluster.kind=slurm", "cluster.ranks_per_node=2"]
    assert plan(*asks)["cluster"]["device"] == "cpu"
    assert plan(*asks, "cluster.slurm.gpus=none")["cluster"]["device"] == "cuda"
    assert plan(*asks, "cluster.gpus_per_node=2")["cluster"]["device"] == "cuda"


def test_fewer_nodes_may_need_far_more_memory() -> None:
    """Eight ranks cannot hold what 512 share; half of them can: no gradient ever stands whole."""
    found = plan(*SLURM, *LARGE, "cluster.gpus_per_node=8", "cluster.min_nodes=1")
    assert found["memory_at_min_nodes"] > 2 * found["memory"]["total"]
    assert [one["key"] for one in found["warnings"]] == ["cluster.min_nodes"]
    assert "1 node, the minimum" in words(found)
    half = plan(*SLURM, *LARGE, "cluster.gpus_per_node=8", "cluster.min_nodes=32")
    assert half["memory_at_min_nodes"] < 1.2 * half["memory"]["total"]
    assert not half["warnings"]


def test_the_largest_model_over_tensor_parallel_nodes() -> None:
    """70B, each layer over the eight GPUs of a node, sharded over the nodes."""
    place = [*SLURM, *LARGE, "cluster.gpus_per_node=8", "parallel.tp=8"]
    whole = plan(*place)
    assert (whole["ranks"], whole["mesh"]) == (512, {"replicate": 1, "shard": 64, "tp": 8})
    assert [one["key"] for one in whole["warnings"]] == ["parallel.sequence_parallel"]
    split = plan(*place, "parallel.sequence_parallel=true")
    assert not split["warnings"]
    assert "tokens split between the layers" in " ".join(words(split).split())
    assert split["memory"]["activations"] < 0.6 * whole["memory"]["activations"]
    flat = plan(*SLURM, *LARGE, "cluster.gpus_per_node=8")
    assert split["memory"]["parameters"] == pytest.approx(flat["memory"]["parameters"], rel=0.01)
    assert split["memory"]["total"] < flat["memory"]["total"]


def test_what_leaves_the_accelerator_is_shown_beside_it() -> None:
    stays = plan(*SLURM, *LARGE, "cluster.gpus_per_node=8")
    moved = plan(*SLURM, *LARGE, "cluster.gpus_per_node=8", "engine.offload=all")
    gone = stays["memory"]["total"] - moved["memory"]["total"]
    assert moved["memory"]["host"] == gone > 0
    assert "on the host" in words(moved)
    assert "on the host" not in words(stays)


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "deepspeed"])
def test_a_large_model_does_not_fit_this_host(kind: str) -> None:
    found = plan("model=llama-70b", f"engine.kind={kind}", "train.global_batch_size=64")
    assert "memory" in [one["key"] for one in found["warnings"]]
    assert "its share of this host" in words(found)


def test_ranks_that_cannot_share_the_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        plan("cluster.ranks_per_node=16")


def test_the_available_bytes_a_gpu_is_what_its_driver_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in -L) echo "GPU 0: x"; echo "GPU 1: x";; *) echo 81559; echo 40960;; esac\n'
    )
    tool.chmod(0o755)
    found = plan("model=llama-1b", env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (found["cluster"]["device"], found["ranks"]) == ("cuda", 2)
    assert found["memory"]["room"] == 40960 << 20
    assert "40 GiB, the GPU" in words(found)
    monkeypatch.setattr(places, "_CGROUP", tmp_path / "none")
    other = plan("model=llama-1b", env={"PATH": f"{tmp_path}:/usr/bin:/bin", **NO_GPU})
    assert other["cluster"]["device"] == "cpu"
    assert other["memory"]["room"] > 1 << 28


def test_a_containers_limit_is_the_hosts_memory(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(f"{1 << 29}\n")
    assert places._host_bytes(cgroup=limit) == 1 << 29
    limit.write_text("max\n")
    assert places._host_bytes(cgroup=limit) > 1 << 29


def test_the_pace_of_a_run_tells_how_long_its_checkpoints_are_apart(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    line = json.dumps({"step": 1, "tokens_per_s": 2048 / 60})  # a step a minute
    (run / "metrics.jsonl").write_text(f"{line}\n" * 3)
    keys = [*SLURM[:1], "cluster.ranks_per_node=2", "cluster.time_limit=1h", f"train.run_dir={run}"]
    (one,) = plan(*keys, "checkpoint.every_steps=100")["warnings"]
    assert one["key"] == "checkpoint"
    assert not plan(*keys, "checkpoint.every_steps=50")["warnings"]
