"""submit, status, logs, stop and resume of a run on this host, as a user goes through them."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import Job, lmscale, processes_of, small_run, wait_until

pytestmark = pytest.mark.slow

SAME = ("step", "loss", "grad_norm", "position", "lr")


def losses(job: Job) -> list[tuple[float, ...]]:
    return [tuple(line[key] for key in SAME) for line in job.lines()]


# A command takes a second to start on a busy machine, and must find the run at work. The rate is low, so that sums in
# another order stay rounding over so many steps.
STEPS = 300
RUN = {"train": {"steps": STEPS}, "optim": {"lr": 2e-4}, "eval": {"every_steps": 100}}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> list[tuple[float, ...]]:
    job = Job(tmp_path_factory.mktemp("uninterrupted"))
    job.write(small_run(corpus, **RUN))
    assert job.train("--nproc", "2").returncode == 0
    return losses(job)


def verb(job: Job, *argv: str, code: int = 0) -> dict[str, Any]:
    """A verb with --json, which must end with `code`."""
    done = lmscale(*argv, "--json", cwd=job.folder, timeout=90, LMSCALE_START="outer", RANK="3")
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout else {"error": done.stderr}


def job_file(job: Job, corpus: Path, **more: Any) -> None:
    job.write(small_run(corpus, **RUN, cluster={"ranks_per_node": 2, **more}))


def test_from_submit_to_the_end_with_a_stop_and_a_resume(
    job: Job, corpus: Path, uninterrupted: list[tuple[float, ...]]
) -> None:
    job_file(job, corpus)
    dry = verb(job, "submit", "run.yaml", "--dry-run")
    assert "-m lmscale train" in dry["preview"]
    assert not job.run_dir.exists()
    (begun,) = [verb(job, "submit", "run.yaml")]
    assert (begun["state"], begun["number"], begun["kind"]) == ("running", 1, "local")
    refused = verb(job, "submit", "run.yaml", code=78)
    assert f"local {begun['job']}" in refused["error"]
    wait_until(lambda: len(job.lines()) >= 5, 60, "step 5")
    stopped = verb(job, "stop", "run")
    assert (stopped["what"], stopped["code"]) == ("stopped", 85)
    assert stopped["checkpoint"] == job.lines()[-1]["step"] < STEPS
    assert not processes_of(job.folder)
    shown = lmscale("logs", "run", cwd=job.folder)
    assert "stopped on request and saved" in shown.stdout
    changed = verb(job, "resume", "run", "optim.lr=1", code=78)
    assert "optim.lr" in changed["error"]
    resumed = verb(job, "resume", "run", "cluster.ranks_per_node=1")
    assert resumed["ranks_per_node"] == 1
    stopped = verb(job, "stop", "run")
    again = verb(job, "resume", "run", "cluster.ranks_per_node=2")
    assert again["number"] == 3
    wait_until(lambda: len(job.lines()) == STEPS, 300, "the last step")
    wait_until(lambda: not processes_of(job.folder), 20, "all have ended")
    for got, want in zip(losses(job), uninterrupted, strict=True):
        assert got == pytest.approx(
            want, rel=1e-5
        )  # one rank for some steps: sums in another order
    assert verb(job, "resume", "run")["finished"] == STEPS


def test_a_killed_supervisor_is_seen_and_the_run_goes_on_bitwise(
    job: Job, corpus: Path, uninterrupted: list[tuple[float, ...]]
) -> None:
    job_file(job, corpus)
    begun = verb(job, "submit", "run.yaml")
    wait_until(lambda: len(job.lines()) >= 9, 60, "step 9")
    os.kill(int(begun["job"]), signal.SIGKILL)
    wait_until(lambda: not processes_of(job.folder), 10, "no rank is left")
    assert verb(job, "stop", "run")["what"] == "not running"
    verb(job, "resume", "run")
    wait_until(lambda: len(job.lines()) == STEPS, 300, "the last step")
    wait_until(lambda: not processes_of(job.folder), 20, "all have ended")
    assert losses(job) == uninterrupted


def test_stop_now_saves_nothing_and_leaves_nothing(job: Job, corpus: Path) -> None:
    job_file(job, corpus)
    verb(job, "submit", "run.yaml", "train.steps=4000", "checkpoint.every_steps=1000")
    wait_until(lambda: len(job.lines()) >= 2, 60, "step 2")
    assert verb(job, "stop", "run", "--now")["what"] == "killed"
    wait_until(lambda: not processes_of(job.folder), 10, "nothing is left")
    assert not job.checkpoints()


def test_what_fails_at_once_is_said_with_its_code_and_leaves_a_log(job: Job, corpus: Path) -> None:
    job_file(job, corpus)
    done = lmscale("submit", "run.yaml", "train.seq_len=1000", cwd=job.folder, timeout=60)
    if done.returncode == 0:  # importing torch took longer than submit watches: a busy machine
        wait_until(lambda: not processes_of(job.folder), 60, "it has ended")
        assert verb(job, "resume", "run", "train.seq_len=32", "--dry-run")["dry_run"]
    else:
        assert done.returncode == 78, done.stdout + done.stderr
        assert "does not divide the corpus' chunks" in done.stdout
        assert "has ended: configuration, 78" in done.stdout
    log = (job.run_dir / "logs" / "job-1.log").read_text()
    assert "does not divide" in log
    several = lmscale("submit", "run.yaml", "cluster.nodes=2", cwd=job.folder)
    assert several.returncode == 78
    assert "kind local is this host alone" in several.stderr


def test_a_broken_run_file_creates_nothing(job: Job, corpus: Path) -> None:
    job_file(job, corpus)
    for override in ("optim.lrr=1", "data.corpora=nowhere", "parallel.dp_shard=5"):
        assert lmscale("submit", "run.yaml", override, cwd=job.folder).returncode == 78
    assert not (job.folder / "runs").exists()
