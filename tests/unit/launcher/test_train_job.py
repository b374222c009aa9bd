"""What `lmscale train` asks a supervisor to do, from a run file and the environment of a template."""

import os
from pathlib import Path
from typing import Any

import pytest

from lmscale.base.errors import ConfigError, UsageError
from lmscale.config.run_file import load
from lmscale_launcher import train as train_module
from lmscale_launcher.doctor.findings import Finding
from lmscale_launcher.supervisor.context import SupervisorJob
from lmscale_launcher.train import world_of

RUN = """
model: {num_layers: 1, hidden_size: 32, num_heads: 2}
data: {corpora: [{path: corpus}]}
optim: {lr: 1e-3}
train: {steps: 40, global_batch_size: 8, micro_batch_size: 2, seq_len: 32, run_dir: run}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("LMSCALE_", "RANK", "WORLD_SIZE", "SLURM", "OMPI_", "PMIX")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("lmscale_launcher.supervisor.supervisor.supervise", lambda job: job)
    return tmp_path


def job_of(*overrides: str) -> SupervisorJob:
    found: Any = train_module.train("run.yaml", overrides, 2)
    assert isinstance(found, SupervisorJob)
    return found


def test_a_start_by_hand_is_checked_by_its_user(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmscale_launcher.doctor.node.check_node", None)  # a call would fail
    job = job_of("cluster.env={NCCL_DEBUG: INFO}", "cluster.max_restarts=3")
    assert job.by_hand and not job.fresh and job.deadline is None and job.stage is None
    assert job.env["NCCL_DEBUG"] == "INFO" and job.env["PATH"] == os.environ["PATH"]
    assert job.max_restarts == 3 and job.unhealthy == ()
    assert (job.stall_limits.fixed_s, job.stall_limits.min_s) == (None, 30.0)


def test_a_template_tells_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"START": "slurm-7-0", "FRESH": "1", "DEADLINE": "1700000000.5", "NODES": "2",
             "NODE_RANK": "1", "MASTER": "head:20007"}  # fmt: skip
    for name, text in given.items():
        monkeypatch.setenv(f"LMSCALE_{name}", text)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    found = [
        Finding("ok", "a", "fine"),
        Finding("warn", "b", "odd", "look"),
        Finding("fail", "c", "gone", "drain"),
    ]
    monkeypatch.setattr("lmscale_launcher.doctor.node.check_node", lambda folder, *, ranks: found)
    job = job_of("cluster.nodes=2", "cluster.stall_limit=90", "data.cache_dir=cache")
    assert not job.by_hand and job.fresh and job.deadline == 1700000000.5
    assert (job.start, job.host) == ("slurm-7-0", "n7")
    assert (job.topology.nodes, job.topology.node, job.topology.master) == (2, 1, "head:20007")
    assert list(job.unhealthy) == ["c: gone; drain"]
    assert job.stall_limits.fixed_s == 90
    assert job.stage is not None and "stage" in job.stage and "run.yaml" in job.stage
    monkeypatch.setenv("LMSCALE_DEADLINE", "soon")
    monkeypatch.setattr(
        "lmscale_launcher.supervisor.supervisor.report_startup_error", lambda job, error: error
    )
    assert "LMSCALE_DEADLINE" in str(train_module.train("run.yaml", ["cluster.nodes=2"], 2))


def test_a_compiler_gets_more_patience(folder: Path) -> None:
    assert job_of("engine.compile=true").stall_limits.min_s == 600.0


@pytest.mark.parametrize(
    ("nodes", "min_nodes", "fits"),
    [("4", None, True), ("3", None, False), ("3", 2, True), ("2", 2, True), ("1", 2, False), ("5", 2, False)],
)  # fmt: skip
def test_a_job_may_have_fewer_nodes_than_it_asked_for(
    folder: Path, nodes: str, min_nodes: int | None, fits: bool
) -> None:
    overrides = ["cluster.nodes=4", "cluster.ranks_per_node=2"]
    cfg = load("run.yaml", [*overrides, f"cluster.min_nodes={min_nodes or 'null'}"])
    env = {
        "LMSCALE_NODES": nodes,
        "LMSCALE_NODE_RANK": "0",
        "LMSCALE_MASTER": "h:1",
        "LMSCALE_START": "s",
    }
    if fits:
        assert world_of(cfg, env)[1] == int(nodes)
    else:
        with pytest.raises(ConfigError, match=f"but this start has {nodes}"):
            world_of(cfg, env)


@pytest.mark.parametrize("master", ["head", "head:", "head:x1", ""])
def test_a_master_without_a_port_is_a_mistake_of_the_template(folder: Path, master: str) -> None:
    env = {
        "LMSCALE_NODES": "2",
        "LMSCALE_NODE_RANK": "0",
        "LMSCALE_MASTER": master,
        "LMSCALE_START": "s",
    }
    with pytest.raises(UsageError, match="LMSCALE_MASTER"):
        world_of(load("run.yaml", ["cluster.nodes=2"]), env)
