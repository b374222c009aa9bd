"""A plan with a corpus: what nodes read, lengths in epochs, and the verb itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmscale.base.errors import ConfigError, DataError
from lmscale.config.run_file import load
from lmscale_launcher.planner.data_plan import data_rows
from lmscale_launcher.planner.facts import build_plan
from lmscale_launcher.planner.plan_text import plan_lines

ROOT = Path(__file__).parents[3]
SMALL = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "train.seq_len=32",
    "train.steps=40",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    (folder / "text.txt").write_text("\n".join(f"{n} text to learn from" for n in range(2000)))
    done = lmscale(
        "prepare", "out", "text.txt", "--tokenizer", "bytes", "--chunk-tokens", "512",
        "--shard-chunks", "8", "--heldout", "0", "--workers", "1", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "out"


def lmscale(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lmscale", *argv],
        cwd=cwd, env=env, timeout=60, capture_output=True, text=True, check=False,
    )  # fmt: skip


def plan(corpus: Path, *overrides: str) -> dict[str, Any]:
    cfg = load("smoke", [f"data.corpora={corpus}", *SMALL, *overrides], cwd=corpus.parent)
    return build_plan(cfg, {"CUDA_VISIBLE_DEVICES": ""})


def test_what_nodes_read_is_in_the_plan(corpus: Path) -> None:
    found = plan(corpus, "cluster.nodes=2", "cluster.ranks_per_node=2", "train.micro_batch_size=2")
    reads = found["node_reads"]
    assert reads["samples"] == [160, 160]  # 40 steps of 8, on two nodes
    assert reads["of_shards"] > 4
    assert 0 < reads["shards"][0] <= reads["shards"][1] <= reads["of_shards"]
    assert (found["vocab_from"], found["epochs"]) == ("corpus", 320 / found["corpus_samples"])
    said = "\n".join(plan_lines(found))
    assert f"of {reads['of_shards']} shards" in said
    assert "read by several nodes" in said
    assert not found["warnings"]


def test_streams_that_wander_are_warned_of(corpus: Path) -> None:
    found = plan(
        corpus, "cluster.nodes=2", "cluster.ranks_per_node=1", "train.global_batch_size=8",
        "train.micro_batch_size=4", "data.streams=7",
    )  # fmt: skip
    assert not found["node_reads"]["streams_stay"]
    assert [one["key"] for one in found["warnings"]] == ["cluster.nodes"]


def test_epochs_become_steps(corpus: Path) -> None:
    found = plan(corpus, "train.steps=null", "train.epochs=2")
    assert found["steps"] == -(-2 * found["corpus_samples"] // 8)


def test_a_corpus_that_cannot_fill_a_step_is_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch.*the corpus has"):
        plan(corpus, "train.global_batch_size=100000")


def test_the_rows_of_a_step_need_the_corpus(tmp_path: Path) -> None:
    cfg = load("smoke", [f"data.corpora={tmp_path / 'nowhere'}"], cwd=tmp_path)
    with pytest.raises(DataError, match="lmscale prepare"):
        data_rows(cfg, "1:2", {"CUDA_VISIBLE_DEVICES": ""})


def test_the_verb_plans_a_cluster_from_a_machine_without_anything(tmp_path: Path) -> None:
    keys = ("model=llama-70b", "cluster.kind=slurm", "cluster.nodes=16", "cluster.gpus_per_node=8",
            "train.global_batch_size=256", "train.micro_batch_size=2")  # fmt: skip
    done = lmscale("plan", "smoke", *keys, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == 128
    said = lmscale("plan", "smoke", *keys, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "memory per rank" in said.stdout
    assert all(len(line) <= 80 for line in said.stdout.splitlines())
