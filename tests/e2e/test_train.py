"""One run from text to a trained model, and what it leaves for people and programs."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.support.jobs import Job, lmscale, small_run


def plan_rows(job: Job, steps: int) -> dict[int, tuple[int, ...]]:
    done = lmscale("plan", "run.yaml", "--data", "--steps", f"1:{steps}", "--json", cwd=job.folder)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["position"] for row in rows}) == len(rows)
    return {row["position"]: row for row in rows}


def test_a_run_trains_validates_resumes_and_says_so(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus))
    first = job.train("train.stop_at=20")
    assert first.returncode == 0, first.stdout + first.stderr
    assert [line["step"] for line in job.lines()] == list(range(1, 21))
    assert job.checkpoints()[-1].startswith("step-00000020")
    assert not any(".tmp" in name for name in job.checkpoints())

    second = job.train()
    assert second.returncode == 0, second.stdout + second.stderr
    said = second.stdout + second.stderr
    assert "step 20" in said, said
    metrics = job.lines()
    assert [line["step"] for line in metrics] == list(range(1, 41))
    assert all(line["position"] == line["step"] * 8 for line in metrics)
    assert all(line["tokens"] == line["position"] * 32 for line in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.3
    assert all(line["mfu"] is None or 0 < line["mfu"] < 2 for line in metrics)

    scores = {line["metric"]: line["value"] for line in job.lines("eval.jsonl")}
    assert {"loss", "bits_per_byte", "bits_per_byte_unigram", "bits_per_byte_bigram"} <= set(scores)
    assert "bits per byte" in said
    assert "unigram" in said
    assert "bigram" in said
    assert "sample" in said
    report = (job.run_dir / "report.html").read_text()
    assert "<svg" in report
    for outside in ("src=", "url(http", "<link", "<script"):
        assert outside not in report, "one self-contained file"
    assert list((job.run_dir / "tensorboard").glob("events.*"))

    rows = plan_rows(job, 40)
    traced = job.trace()
    assert traced.keys() == rows.keys()
    for position, (corpus_index, epoch, sample, _) in traced.items():
        row = rows[position]
        assert (corpus_index, epoch, sample) == (row["corpus"], row["epoch"], row["sample"])

    third = job.train()
    assert third.returncode == 0
    assert "finished" in third.stdout + third.stderr
    assert len(job.lines()) == 40


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    job: Job, corpus: Path, number: signal.Signals
) -> None:
    job.write(small_run(corpus, train={"steps": 100_000}, checkpoint={"every_steps": 100_000}))
    process = job.start()
    job.wait_for_step(5, process)
    time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 85, said
    steps = [line["step"] for line in job.lines()]
    assert steps == list(range(1, len(steps) + 1))
    assert job.checkpoints() == [f"step-{steps[-1]:08d}-a1"]
    assert "same command" in said

    again = job.train(f"train.stop_at={steps[-1] + 5}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"step {steps[-1]}" in again.stdout + again.stderr
    assert [line["step"] for line in job.lines()] == list(range(1, steps[-1] + 6))
