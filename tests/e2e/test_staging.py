"""A run with a node-local cache: the same samples and losses, whatever the cache does."""

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lmscale_launcher.stage import command
from tests.support.jobs import Job, clean_env, small_run

STEPS = 12
CACHED = {"data": {"cache_dir": "cache"}, "train": {"steps": STEPS}}


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same run without a cache."""
    job = Job(tmp_path_factory.mktemp("plain"))
    job.write(small_run(corpus, train={"steps": STEPS}))
    done = job.train("--nproc", "2")
    assert done.returncode == 0, done.stderr
    return job


def staged(job: Job) -> None:
    """What the supervisor of a node does before it starts the ranks."""
    argv = command(
        job.folder / "run.yaml", node=0, nodes=1, ranks_per_node=2,
        overrides=[f"data.cache_dir={job.folder / 'cache'}", f"train.run_dir={job.run_dir}"],
    )  # fmt: skip
    assert argv is not None
    done = subprocess.run(
        argv,
        cwd=job.folder,
        env=clean_env(),
        timeout=60,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def copies(job: Job) -> list[Path]:
    return sorted((job.folder / "cache").glob("*/*.chunk"))


def same(job: Job, plain: Job) -> None:
    assert job.trace() == plain.trace()
    assert losses(job) == losses(plain)


def losses(job: Job) -> list[tuple[Any, ...]]:
    return [tuple(line[k] for k in ("step", "loss", "position")) for line in job.lines()]


def test_a_run_on_copies_alone_has_the_same_samples_and_losses(
    job: Job, corpus: Path, plain: Job
) -> None:
    mine = Path(shutil.copytree(corpus, job.folder / "corpus"))
    job.write(small_run(mine, **CACHED))
    staged(job)
    assert copies(job)
    for shard in (mine / "train").glob("*.tar"):
        shard.unlink()
    done = job.train("--nproc", "2")  # which stages, too, and finds everything there
    assert done.returncode == 0, done.stderr
    assert "stage: 0 chunks" in done.stderr
    same(job, plain)


@pytest.mark.slow
def test_a_run_whose_copies_are_damaged_or_gone_has_the_same_samples_and_losses(
    job: Job, corpus: Path, plain: Job
) -> None:
    seed = int(os.environ.get("LMSCALE_TEST_SEED", random.randrange(1 << 32)))
    print(f"LMSCALE_TEST_SEED={seed}")
    chance = random.Random(seed)
    job.write(small_run(corpus, **CACHED))
    staged(job)
    for path in copies(job)[::2]:
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data) - 200)] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    process = job.start("--nproc", "2")
    job.wait_for_step(2, process)
    shutil.rmtree(job.folder / "cache")
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, out
    assert "data.cache_dir" in out
    same(job, plain)


@pytest.mark.slow
def test_what_is_staged_follows_the_checkpoint(job: Job, corpus: Path, plain: Job) -> None:
    job.write(small_run(corpus, **CACHED))
    done = job.train("--nproc", "2", "train.stop_at=7")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(job.folder / "cache", ignore_errors=True)
    staged(job)
    with_trace = {position: line for position, line in plain.trace().items() if position >= 7 * 8}
    samples_a_chunk = 1024 // 32
    want = {line[2] // samples_a_chunk for line in with_trace.values()}
    assert {int(path.stem) for path in copies(job)} == want
    done = job.train("--nproc", "2")
    assert done.returncode == 0, done.stderr
    same(job, plain)
