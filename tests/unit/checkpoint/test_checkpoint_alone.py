"""One process without a process group: as `lmscale generate` loads, and the faults of storage."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lmscale.base.errors import CheckpointError, LmscaleError, Overtaken, RetryableError
from lmscale.checkpoint import save as saving
from lmscale.checkpoint.load import load_checkpoint, load_weights_one_process
from lmscale.checkpoint.retention import retain
from lmscale.checkpoint.save import save_checkpoint
from lmscale.checkpoint.torch_dcp import Mismatch
from lmscale.checks.resume_checks import read_checkpoint
from lmscale.run_folder.attempts import claim
from lmscale.run_folder.checkpoints import damage, listing
from lmscale.run_folder.paths import RunFolder

BODY = {"state": {"position": 7}, "identity": {"seed": 1}, "config": {}, "provenance": {"x": None}}


def tensors() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return {
        "model.a.weight": torch.randn(70, 30, generator=made),
        "model.a.bias": torch.randn(70, generator=made),
        "model.scale": torch.tensor(2.5),
        "model.none": torch.zeros(0, 3),
        "optim.exp_avg.a.weight": torch.randn(70, 30, generator=made, dtype=torch.float64),
        "optim.count": torch.tensor(5),
    }


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    assert claim(folder, {}) == 1
    return folder


def save_step(run: RunFolder, step: int, attempt: int = 1) -> Path:
    return save_checkpoint(run, tensors(), step=step, attempt=attempt, body=BODY)


def test_what_was_saved_is_loaded_bit_for_bit(run):
    path = save_step(run, 12)
    assert path == run.checkpoints / "step-00000012-a1"
    loaded = {name: torch.full_like(tensor, 9) for name, tensor in tensors().items()}
    kept = dict(loaded)
    load_checkpoint(path, loaded)
    for name, want in tensors().items():
        assert torch.equal(loaded[name], want), name
        assert loaded[name] is kept[name], "in place"


def test_the_folder_is_sound_and_holds_no_pickle(run):
    path = save_step(run, 12)
    assert damage(path, deep=True) == []
    assert sorted(os.listdir(path)) == ["manifest.json", "rank-00000.safetensors"]
    assert read_checkpoint(path) == {"format": 1, "step": 12, "attempt": 1, **BODY}


def test_weights_for_one_process_come_by_parameter_name(run):
    weights = load_weights_one_process(save_step(run, 1))
    assert sorted(weights) == ["a.bias", "a.weight", "none", "scale"]
    assert torch.equal(weights["a.weight"], tensors()["model.a.weight"])


def test_a_part_of_the_tensors_can_be_loaded_into_parameters(run):
    weight = torch.nn.Parameter(torch.zeros(70, 30))
    load_checkpoint(save_step(run, 1), {"model.a.weight": weight})
    assert torch.equal(weight, tensors()["model.a.weight"])


def test_float64_and_float32_convert_and_nothing_else_does(run):
    path = save_step(run, 1)
    moment = torch.zeros(70, 30)
    load_checkpoint(path, {"optim.exp_avg.a.weight": moment})
    assert torch.equal(moment, tensors()["optim.exp_avg.a.weight"].float())
    with pytest.raises(Mismatch, match=r"model.a.bias: torch.float32 .*, torch.bfloat16 here"):
        load_checkpoint(path, {"model.a.bias": torch.zeros(70, dtype=torch.bfloat16)})


def test_another_model_is_told_in_full_and_is_not_called_damage(run):
    path = save_step(run, 1)
    with pytest.raises(Mismatch) as caught:
        load_checkpoint(path, {"model.a.weight": torch.zeros(30, 70), "model.b": torch.zeros(1)})
    assert "2 tensor(s) differ" in str(caught.value)
    assert "model.a.weight: (70, 30) in the checkpoint, (30, 70) here" in str(caught.value)
    assert "model.b: not in the checkpoint" in str(caught.value)


def test_low_precision_weights_are_refused_and_nothing_is_left(run):
    with pytest.raises(LmscaleError, match=r"model.w: torch.bfloat16 .* pass the fp32 master"):
        save_checkpoint(run, {"model.w": torch.ones(2).bfloat16()}, step=1, attempt=1, body=BODY)
    assert os.listdir(run.checkpoints) == []


def test_every_byte_of_every_file_is_guarded(run):
    path = save_step(run, 1)
    for file in sorted(path.iterdir()):
        sound = file.read_bytes()
        places = {0, 7, 8, 100, len(sound) // 2, len(sound) - 2}
        for place in places:
            damaged = bytearray(sound)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name) as caught:
                load_checkpoint(path, tensors())
            assert not isinstance(caught.value, Mismatch), (file.name, place)
        file.write_bytes(sound)
    load_checkpoint(path, tensors())


def test_a_truncated_or_missing_file_is_named(run):
    path = save_step(run, 1)
    file = path / "rank-00000.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: \d+ bytes, expected"):
        load_checkpoint(path, tensors())
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: missing"):
        load_checkpoint(path, tensors())
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest"):
        load_checkpoint(path, tensors())


def test_damage_never_reaches_a_tensor(run):
    path = save_step(run, 1)
    file = path / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    file.write_bytes(data)
    target = {"model.a.weight": torch.full((70, 30), 4.0)}
    with pytest.raises(CheckpointError):
        load_checkpoint(path, target)
    assert (target["model.a.weight"] == 4.0).all()


def test_the_state_of_a_step_is_saved_once(run):
    path = save_step(run, 5)
    before = (path / "manifest.json").stat().st_ino
    assert save_step(run, 5) == path
    assert (path / "manifest.json").stat().st_ino == before


def test_what_a_killed_save_left_is_in_nobodys_way(run):
    leftover = run.checkpoints / "step-00000005-a1.tmp"
    leftover.mkdir(parents=True)
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    assert damage(save_step(run, 5), deep=True) == []
    assert not leftover.exists()


def test_an_overtaken_attempt_publishes_nothing(run):
    save_step(run, 5)
    claim(run, {})
    with pytest.raises(Overtaken):
        save_step(run, 6)
    assert os.listdir(run.checkpoints) == ["step-00000005-a1"]


def test_an_attempt_overtaken_while_it_writes_publishes_nothing(run, monkeypatch):
    real = saving.write_manifest

    def overtake(*args):
        real(*args)
        claim(run, {})

    monkeypatch.setattr(saving, "write_manifest", overtake)
    with pytest.raises(Overtaken):
        save_step(run, 6)
    assert [one.path for one in listing(run)] == []


@pytest.fixture
def small_disk(run):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a full disk needs root: mount -t tmpfs -o size=1m")
    run.checkpoints.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "lmscale-test", run.checkpoints],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a full disk needs mount rights: {mounted.stderr}")
    yield run
    subprocess.run(["umount", run.checkpoints], check=True)


def test_a_full_disk_is_retryable_and_leaves_the_older_checkpoints(small_disk):
    old = save_step(small_disk, 1)
    with pytest.raises(RetryableError, match="No space left on device"):
        save_checkpoint(small_disk, {"model.w": torch.zeros(500_000)}, step=2, attempt=1, body=BODY)
    assert os.listdir(small_disk.checkpoints) == [old.name]
    assert damage(old, deep=True) == []
    assert save_step(small_disk, 3).exists(), "the run goes on"


def test_retention_keeps_the_newest_valid_ones(run):
    for step in (1, 2, 3, 4, 5):
        save_step(run, step)
    (run.checkpoints / "step-00000005-a1" / "rank-00000.safetensors").unlink()
    deleted = retain(run, 2, 1)
    assert [path.name for path in deleted] == ["step-00000002-a1", "step-00000001-a1"]
    left = ["step-00000003-a1", "step-00000004-a1", "step-00000005-a1"]
    assert sorted(os.listdir(run.checkpoints)) == left
    retain(run, 0, 1)
    assert [found.step for found in listing(run) if found.valid] == [4], "never the newest"


def test_retention_clears_what_older_attempts_left_unfinished(run):
    for name in ("step-00000007-a1.tmp", "step-00000009-a2.tmp", "notes.tmp"):
        (run.checkpoints / name).mkdir(parents=True)
    claim(run, {})
    save_step(run, 8, attempt=2)
    assert retain(run, 3, 2) == []
    left = ["notes.tmp", "step-00000008-a2", "step-00000009-a2.tmp"]
    assert sorted(os.listdir(run.checkpoints)) == left


def test_an_overtaken_attempt_deletes_nothing(run):
    for step in (1, 2, 3):
        save_step(run, step)
    claim(run, {})
    with pytest.raises(Overtaken):
        retain(run, 1, 1)
    assert len(os.listdir(run.checkpoints)) == 3


def test_the_manifest_tells_other_programs_where_each_tensor_lies(run):
    path = save_step(run, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["tensors"]["model.a.bias"]
    (part,) = entry["parts"]
    begin, end = part["bytes"]
    data = (path / part["file"]).read_bytes()[begin:end]
    assert entry["dtype"] == "F32" and entry["shape"] == [70]
    assert data == tensors()["model.a.bias"].numpy().tobytes()
