"""Other ways to start the ranks train to the same losses as `lmscale train`."""

import sys
from pathlib import Path

import pytest

from tests.support.jobs import Job, clean_env, finished_process, small_run

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
RANKS = ["-m", "lmscale", "train"]
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", *RANKS],
    "accelerate": [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", *RANKS],
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[float]:
    job = Job(tmp_path_factory.mktemp("ours"))
    job.write(small_run(corpus, train={"steps": 12}))
    assert job.train("--nproc", "2").returncode == 0
    return [line["loss"] for line in job.lines()]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_same_losses(job: Job, corpus: Path, ours: list[float], launcher: str) -> None:
    job.write(small_run(corpus, train={"steps": 12}))
    done = finished_process([*LAUNCHERS[launcher], "run.yaml"], cwd=job.folder, env=clean_env())
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["loss"] for line in job.lines()] == ours
    metrics = job.run_dir / "metrics.jsonl"
    before = metrics.read_bytes()
    again = finished_process([*LAUNCHERS[launcher], "run.yaml"], cwd=job.folder, env=clean_env())
    assert again.returncode == 0, again.stdout + again.stderr
    assert "finished" in again.stdout + again.stderr
    assert metrics.read_bytes() == before
