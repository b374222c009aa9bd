"""Going on from another run's checkpoint, and what an attempt does whose files were taken from it."""

import shutil
from pathlib import Path

import pytest

from tests.support.jobs import Job, lmscale, small_run

pytestmark = pytest.mark.slow


def test_another_runs_checkpoint_is_gone_on_from_and_its_damage_ends_the_start(
    job: Job, corpus: Path
) -> None:
    job.write(small_run(corpus))
    assert job.train("train.stop_at=7", "parallel.dp_shard=2").returncode == 0
    scored = lmscale("eval", job.run_dir, "--max-samples", "4", cwd=job.folder)
    assert scored.returncode == 0, "on one rank, whatever was trained on"
    (name,) = job.checkpoints()
    other = Job(job.folder, "other")
    other.write(small_run(corpus))
    resume = f"train.resume={job.run_dir / 'checkpoints' / name}"
    done = other.train(resume, "train.stop_at=9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in other.lines()] == [8, 9]
    assert other.checkpoints() == ["step-00000009-a1"]

    for file in (job.run_dir / "checkpoints" / name).glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    third = Job(job.folder, "third")
    third.write(small_run(corpus))
    done = third.train(resume, timeout=60)
    assert done.returncode == 65, done.stdout + done.stderr
    assert "train.resume" in done.stdout + done.stderr


def test_lines_that_nobody_would_see_end_the_start_before_its_next_checkpoint(
    job: Job, corpus: Path
) -> None:
    """What an orphan does that slept before it cut the files: its copy takes the name of ours."""
    job.write(small_run(corpus, train={"steps": 100_000}, checkpoint={"every_steps": 50}))
    process = job.start()
    job.wait_for_step(10, process)
    metrics = job.run_dir / "metrics.jsonl"
    shutil.copy(metrics, job.folder / "copy")
    (job.folder / "copy").rename(metrics)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "metrics.jsonl" in said
    again = job.train("train.stop_at=60")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line["step"] for line in job.lines()] == list(range(1, 61))
