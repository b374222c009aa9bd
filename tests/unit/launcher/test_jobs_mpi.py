"""The command line of mpirun: hosts, environment, root, and what cannot work."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lmscale.base.errors import ConfigError
from lmscale.config.cluster_schema import ClusterConfig
from lmscale_launcher.clusters.job import JobPlan
from lmscale_launcher.clusters.mpi import MpiCluster, mpirun


def plan_of(folder: Path, python: str = sys.executable, **cluster: Any) -> JobPlan:
    section = ClusterConfig.model_validate({"kind": "mpi", **cluster})
    return JobPlan(
        name="run", run_dir=folder / "run", number=3, nodes=section.nodes, min_nodes=section.nodes,
        ranks_per_node=4, gpus_per_node=0, workdir=folder, python=python, cluster=section,
    )  # fmt: skip


def test_one_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    words = mpirun(plan_of(tmp_path), {})
    assert words[0] == str(Path(sys.executable).with_name("mpirun"))
    assert words[1:5] == ["-n", "4", "--host", "localhost:4"]
    config = tmp_path / "run" / "jobs" / "3.yaml"
    assert words[-6:] == [sys.executable, "-P", "-m", "lmscale", "train", str(config)]
    assert "--allow-run-as-root" not in words
    assert "-x" not in words
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--allow-run-as-root" in mpirun(plan_of(tmp_path), {})


def test_a_list_of_hosts_gets_slots_and_variables(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        nodes=2,
        env={"NCCL_DEBUG": "INFO"},
        mpi={"hosts": ["a", "b:8"], "options": ["--mca", "btl", "tcp,self"]},
    )
    words = mpirun(plan, {"PYTHONPATH": "x", "SECRET": "y"})
    assert words[1:5] == ["-n", "8", "--host", "a:4,b:8"]
    passed = {words[i + 1] for i, word in enumerate(words) if word == "-x"}
    assert passed == {"LMSCALE_START", "PYTHONUNBUFFERED", "PYTHONPATH", "NCCL_DEBUG"}
    at = words.index("--mca")
    assert words[at : at + 3] == ["--mca", "btl", "tcp,self"]
    assert "NCCL_DEBUG=INFO " in MpiCluster().preview(plan)


def test_hosts_of_a_job_are_those_of_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = [sys.executable, "-c", "import time; time.sleep(30)"]
    monkeypatch.setattr("lmscale_launcher.clusters.mpi._supervisor", lambda plan: asleep)
    monkeypatch.setattr("lmscale_launcher.clusters.background._WATCH_S", 0.1)
    plan = plan_of(tmp_path, nodes=2, mpi={"hosts": ["a", "b:8"]})
    record, cluster = MpiCluster().submit(plan), MpiCluster()
    try:
        (state,) = cluster.states([(plan.folder, record)])
        assert (state.standing, state.hosts) == ("running", ("a", "b"))
    finally:
        cluster.cancel(plan.folder, record)
    os.waitpid(int(record.job), 0)


def test_what_cannot_work_is_said_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.mpi\.hosts: 1 hosts for cluster\.nodes=2"):
        mpirun(plan_of(tmp_path, nodes=2, mpi={"hosts": ["a"]}), {})
    with pytest.raises(ConfigError, match="hostfile"):
        mpirun(plan_of(tmp_path, nodes=2), {})
    listed = plan_of(tmp_path, nodes=2, mpi={"options": ["--hostfile", "h"]})
    assert "--host" not in mpirun(listed, {})
    with pytest.raises(ConfigError, match=r"lmscale\[mpi\]"):
        mpirun(plan_of(tmp_path, python="/nowhere/python"), {"PATH": ""})
