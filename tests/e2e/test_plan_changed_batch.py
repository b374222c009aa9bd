"""`plan --data` of a run whose batch was changed on the way, against what it was trained on."""

import json
from pathlib import Path

import pytest

from tests.support.jobs import Job, lmscale, small_run

ALLOW = "train.allow_change=[train.global_batch_size]"


def planned(job: Job, *argv: str) -> list[dict[str, int]]:
    done = lmscale("plan", "run.yaml", *argv, "--data", "--json", cwd=job.folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_changed_batch_is_listed_before_and_after_each_change(job: Job, corpus: Path) -> None:
    """The past follows the checkpoint's journal, what is to come follows the run file."""
    batches = (8, 12, 4)
    last = 5 * len(batches)
    job.write(small_run(corpus, train={"steps": last}, eval={"every_steps": None}))
    for index, batch in enumerate(batches):
        given = (f"train.global_batch_size={batch}", ALLOW)
        done = job.train(f"train.stop_at={5 * (index + 1)}", *given)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = planned(job, *given)
        samples = 5 * sum(batches[:index]) + (last - 5 * index) * batch
        assert [row["position"] for row in rows] == list(range(samples))
    traced = job.trace()
    assert sorted(traced) == [row["position"] for row in rows]
    for row in rows:
        assert traced[row["position"]][:3] == (row["corpus"], row["epoch"], row["sample"])
    some = planned(job, *given, "--steps", "5:6")
    assert [row["position"] for row in some] == list(range(4 * 8, 5 * 8 + 12))
    refused = lmscale("plan", "run.yaml", "--data", cwd=job.folder)  # the file still says 8
    assert refused.returncode == 78
    assert "train.allow_change" in refused.stderr
