"""Real faults during a save or a load of several ranks: all ranks hear of it, nothing half is left."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from lmscale.run_folder.attempts import claim
from lmscale.run_folder.checkpoints import damage, newest_valid
from lmscale.run_folder.paths import RunFolder
from tests.support.checkpoint_case import (
    load_as,
    save_as,
    save_mixed_precision,
    save_numbers,
    save_with_fault,
    try_load,
)
from tests.support.rank_pool import Died


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    claim(folder, {})
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("io", "RetryableError", "Input/output error"),
        ("bug", "LmscaleError", "a bug in the writer"),
    ],
)
def test_a_writer_that_fails_fails_all_ranks_and_hangs_none(ranks, run, rank, fault, kind, text):
    old = ranks(2)(save_as, str(run.path), "rows", 1)[0]
    began = time.monotonic()
    answers = ranks(2)(save_with_fault, str(run.path), fault, rank, 2)
    assert time.monotonic() - began < 10
    assert [answer[0] for answer in answers] == [kind, kind]
    assert all(text in answer[1] for answer in answers)
    assert os.listdir(run.checkpoints) == [Path(old).name]
    assert damage(Path(old), deep=True) == []
    assert ranks(2)(save_as, str(run.path), "rows", 2), "the run goes on and saves again"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_it_writes_leaves_no_checkpoint_and_the_next_save_works(
    ranks, run, rank
):
    old = ranks(2)(save_as, str(run.path), "rows", 1)[0]
    answers = ranks(2)(save_with_fault, str(run.path), "kill", rank, 2, deaths=[rank])
    assert answers[rank] == Died(-9)
    assert answers[1 - rank][0] == "DistributedError"
    assert str(newest_valid(run).path) == old
    assert ranks(2)(load_as, old, "rows") == [[], []]
    new = ranks(2)(save_as, str(run.path), "rows", 2)[0]
    assert ranks(2)(load_as, new, "rows") == [[], []]
    assert sorted(os.listdir(run.checkpoints)) == ["step-00000001-a1", "step-00000002-a1"]


def test_low_precision_on_one_rank_is_refused_on_all(ranks, run):
    answers = ranks(2)(save_mixed_precision, str(run.path))
    assert [answer[0] for answer in answers] == ["LmscaleError"] * 2
    assert all("rank 1" in text and "torch.bfloat16" in text for _, text in answers)


@pytest.fixture
def small_disk(run):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a full disk needs root: mount -t tmpfs -o size=1m")
    run.checkpoints.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "lmscale-test", run.checkpoints]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a full disk needs mount rights: {mounted.stderr}")
    yield run
    subprocess.run(["umount", run.checkpoints], check=True)


def test_a_full_disk_is_retryable_on_all_ranks_and_leaves_nothing(ranks, small_disk):
    run = small_disk
    assert ranks(2)(save_numbers, str(run.path), 1000, 1) == [("fine", "step-00000001-a1")] * 2
    answers = ranks(2)(save_numbers, str(run.path), 200_000, 2)
    assert [answer[0] for answer in answers] == ["RetryableError"] * 2
    assert all("No space left on device" in answer[1] for answer in answers)
    assert os.listdir(run.checkpoints) == ["step-00000001-a1"]
    assert damage(run.checkpoint(1, 1), deep=True) == []
    assert ranks(2)(save_numbers, str(run.path), 1000, 3) == [("fine", "step-00000003-a1")] * 2


def test_damage_that_one_rank_reads_is_everyones_error_and_names_file_and_block(ranks, run):
    path = Path(ranks(2)(save_as, str(run.path), "rows", 1)[0])
    file = path / "rank-00001.safetensors"
    sound = file.read_bytes()
    damaged = bytearray(sound)
    damaged[len(sound) // 2] ^= 16
    file.write_bytes(damaged)
    answers = ranks(2)(try_load, str(path))
    assert [answer[0] for answer in answers] == ["CheckpointError"] * 2
    assert all(f"{file}: block 0 (bytes 0-" in answer[1] for answer in answers)
    file.write_bytes(sound[:-1])
    assert all("expected" in answer[1] for answer in ranks(2)(try_load, str(path)))
    file.unlink()
    assert all(f"{file}: missing" in answer[1] for answer in ranks(2)(try_load, str(path)))
    file.write_bytes(sound)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 2'))
    answers = ranks(2)(try_load, str(path))
    assert [answer[0] for answer in answers] == ["CheckpointError"] * 2
    assert all("manifest.json" in answer[1] for answer in answers)
