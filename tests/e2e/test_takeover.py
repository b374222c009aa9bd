"""Two starts of one run that a scheduler made: the newer goes on, the older ends, and nobody sees both."""

from pathlib import Path

import pytest

from tests.support.jobs import Job, small_run

pytestmark = pytest.mark.slow

STEPS = 300
SAME = ("step", "loss", "grad_norm", "position")


def test_a_schedulers_start_takes_over_and_the_older_ends_with_87(job: Job, corpus: Path) -> None:
    run = small_run(corpus, train={"steps": STEPS}, checkpoint={"every_steps": 10})
    job.write(run)
    older = job.start(LMSCALE_START="job-7-0")
    job.wait_for_step(25, older)
    newer = job.start(LMSCALE_START="job-7-1")
    said_older, _ = older.communicate(timeout=120)
    assert older.returncode == 87, said_older
    assert "attempt 2 has taken over" in said_older
    said_newer, _ = newer.communicate(timeout=180)
    assert newer.returncode == 0, said_newer

    alone = Job(job.folder, "alone")
    alone.write(run)
    done = alone.train()
    assert done.returncode == 0, done.stdout + done.stderr
    lines, want = job.lines(), alone.lines()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [{k: line[k] for k in SAME} for line in lines] == [
        {k: line[k] for k in SAME} for line in want
    ]
    assert job.trace() == alone.trace()
