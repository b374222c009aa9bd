"""Each way in which Slurm refuses a job: in words, with an exit code, at once; and nothing stays in the queue."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import LMSCALE, User

from tests.support.jobs import clean_env, finished_process
from tests.support.testbed import Testbed, wait_for

AT_ONCE_S = 15.0
ON = "cluster.slurm"

REFUSED = {
    "partition": ([f"{ON}.partition=nope"], f"{ON}.partition: there is no partition nope", "high, scav"),
    "time": ([f"{ON}.partition=short", "cluster.time_limit=10m"], "cluster.time_limit: 10m00s", "5m00s"),
    "max_nodes": (
        [f"{ON}.partition=short", "cluster.nodes=3", "cluster.time_limit=4m"],
        "cluster.nodes: 3", "allows 2",
    ),
    "min_nodes": (
        [f"{ON}.partition=short", "cluster.nodes=3", "cluster.min_nodes=2", "cluster.time_limit=4m"],
        "cluster.nodes: 3", "allows 2",
    ),
    "nodes": (["cluster.nodes=5", "train.global_batch_size=16"], "cluster.nodes: 5 nodes", "has 4"),
    "gpus": (["cluster.gpus_per_node=5"], "cluster.gpus_per_node: 5 GPUs a node", "at most 4"),
    "gpu_type": (["cluster.gpus_per_node=1", f"{ON}.gpu_type=a100"], f"{ON}.gpu_type: 1 a100", "have none"),
    "cores": ([f"{ON}.cpus_per_task=9"], f"{ON}.cpus_per_task: 9 cores a node", "at most 8"),
    "memory": ([f"{ON}.memory=20G"], f"{ON}.memory: 20480 MiB", "at most 16000"),
    "reservation": ([f"{ON}.reservation=nope"], f"{ON}.reservation", "no reservation nope"),
    "constraint": ([f"{ON}.constraint=nope"], f"{ON}.constraint", "no node has the feature nope"),
    "nodelist": ([f"{ON}.nodelist=[n9]"], f"{ON}.nodelist", "n1, n2, n3, n4"),
    "option": ([f"{ON}.sbatch=[--foo]"], f"{ON}.sbatch", "unrecognized option"),
    "option_value": ([f"{ON}.sbatch=['--time=abc']"], f"{ON}.sbatch", "Invalid --time"),
    "too_late": (
        [f"{ON}.partition=short", "cluster.time_limit=4m", f"{ON}.sbatch=['-t 10']"],
        "could never start", "was cancelled",
    ),
    "licenses": ([f"{ON}.sbatch=[--licenses=foo]"], f"{ON}.sbatch", "licenses"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_never_run_is_refused_in_words(user: User, whole: Testbed, case: str) -> None:
    overrides, *words = REFUSED[case]
    begun = time.monotonic()
    done = user.do("submit", f"{user.name}.yaml", "--cluster", "testbed", *overrides)
    assert time.monotonic() - begun < AT_ONCE_S
    assert done.returncode == 78, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    wait_for(lambda: not whole.run("squeue", "-h").strip(), 15, "nothing is queued")


def test_a_dependency_that_failed_is_said(user: User, whole: Testbed) -> None:
    failed = whole.run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "exit 1").strip()
    wait_for(lambda: not whole.run("squeue", "-h", "-t", "PD,R,CG").strip(), 30, "it has failed")
    option = f"{ON}.sbatch=['--dependency=afterok:{failed}']"
    done = user.do("submit", f"{user.name}.yaml", "--cluster", "testbed", option)
    assert done.returncode == 78, done.stderr
    assert "DependencyNeverSatisfied" in done.stderr


def test_a_job_that_only_waits_is_queued_with_its_reason(user: User, whole: Testbed) -> None:
    whole.run("sbatch", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 60")
    wait_for(lambda: bool(whole.run("squeue", "-h", "-t", "R").strip()), 15, "the cluster is full")
    user.submit()
    said = user.status()
    assert said["state"] == "pending"
    assert "free nodes" in said["reason"]
    out = user.must("stop", user.run_dir)
    assert "queue" in out
    assert user.status()["state"] == "stopped"


def test_the_log_folder_exists_before_the_job(user: User, whole: Testbed) -> None:
    """Slurm would fail a job whose log cannot be opened, without a word anywhere."""
    user.submit("train.steps=20", "train.stop_at=2", "cluster.nodes=1")
    user.wait_state("stopped", "finished", "failed")
    assert "going to step" in user.log() or "step 2" in user.log()


def test_a_dead_controller_is_no_end_and_no_hang(user: User, whole: Testbed) -> None:
    whole.kill_controller()
    begun = time.monotonic()
    done = user.do("submit", f"{user.name}.yaml", "--cluster", "testbed")
    assert done.returncode == 75
    assert "controller does not answer" in done.stderr
    assert time.monotonic() - begun < AT_ONCE_S
    whole.start_controller()


def test_a_hanging_controller_is_given_up(user: User, whole: Testbed) -> None:
    pid = int((whole.root / "run/slurmctld.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        done = user.do("submit", f"{user.name}.yaml", "--cluster", "testbed")
        assert time.monotonic() - begun < AT_ONCE_S
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 75
    assert "answer" in done.stderr


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({"SLURM_CONF": "/nowhere/slurm.conf"}, "not set up"),
        ({"PATH": "/nowhere"}, "no Slurm on this machine"),
    ],
)
def test_a_machine_without_slurm_says_so(user: User, env: dict[str, str], word: str) -> None:
    argv: list[str | Path] = [LMSCALE, "submit", f"{user.name}.yaml", "--cluster", "testbed"]
    begun = time.monotonic()
    done = finished_process(argv, cwd=user.folder, env=clean_env(**env), timeout=60)
    assert done.returncode in (75, 78)
    assert word in done.stderr
    assert time.monotonic() - begun < AT_ONCE_S
