"""Checkpoint manifests prove damage, and only damage."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.errors import CheckpointError, ConfigError, RetryableError
from lmscale.run_folder.attempts import claim, settle
from lmscale.run_folder.checkpoints import (
    damage,
    describe_file,
    listing,
    newest_valid,
    publish_folder,
    read_manifest,
    unknown_files,
    write_manifest,
)
from lmscale.run_folder.paths import RunFolder, checkpoint_name, parse_checkpoint_name

BLOCK = 64


def checkpoint(folder: RunFolder, step: int, attempt: int = 1, size: int = 200) -> Path:
    final = folder.checkpoint(step, attempt)
    temporary = final.with_name(final.name + ".tmp")
    temporary.mkdir(parents=True)
    data = temporary / "part-0.safetensors"
    data.write_bytes(bytes(i % 251 for i in range(size)))
    files = {data.name: describe_file(data, block_bytes=BLOCK)}
    body = {"format": 1, "step": step, "attempt": attempt, "files": files, "state": {7: 0.1}}
    write_manifest(temporary, body)
    publish_folder(temporary, final)
    return final


@given(st.integers(0, 10**12), st.integers(1, 10**4))
def test_checkpoint_names_round_trip(step: int, attempt: int) -> None:
    assert parse_checkpoint_name(checkpoint_name(step, attempt)) == (step, attempt)


@pytest.mark.parametrize("name", ["step-1-a1", "step-00000001-a1.tmp", "step-00000001", "best"])
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert parse_checkpoint_name(name) is None


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]))
def test_every_changed_byte_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int
) -> None:
    path = checkpoint(RunFolder(tmp_path_factory.mktemp("run")), 10, size=size)
    assert damage(path, deep=True) == []
    victim = data.draw(st.sampled_from([p for p in path.iterdir() if p.stat().st_size]))
    before = json.loads((path / "manifest.json").read_text())
    content = bytearray(victim.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    victim.write_bytes(content)
    problems = damage(path, deep=True)
    if victim.name != "manifest.json":
        block = where // BLOCK * BLOCK
        assert f"(bytes {block}-{min(block + BLOCK, size)})" in problems[0]
        assert damage(path) == []  # the cheap look reads no data
    else:
        assert problems or json.loads(content) == before  # a blank became another blank


@pytest.mark.parametrize("fault", ["cut", "longer", "gone", "no manifest", "manifest", "renamed"])
def test_cheap_look_finds(tmp_path: Path, fault: str) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(folder, 10)
    path = checkpoint(folder, 20)
    part, manifest = path / "part-0.safetensors", path / "manifest.json"
    match fault:
        case "cut":
            part.write_bytes(part.read_bytes()[:-1])
        case "longer":
            part.write_bytes(part.read_bytes() + b"x")
        case "gone":
            part.unlink()
        case "no manifest":
            manifest.unlink()
        case "manifest":
            manifest.write_text(manifest.read_text().replace('"step": 20', '"step": 21'))
        case "renamed":
            path = path.rename(folder.checkpoint(30, 1))
    assert damage(path)
    found = newest_valid(folder)
    assert found is not None and found.step == 10


def test_a_manifest_survives_its_round_trip(tmp_path: Path) -> None:
    body = read_manifest(checkpoint(RunFolder(tmp_path), 10))
    assert body["state"] == {"7": 0.1} and "digest" not in body


def test_if_all_are_damaged_the_run_does_not_start_from_zero(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert newest_valid(folder) is None
    paths = [checkpoint(folder, 10), checkpoint(folder, 20)]
    (paths[0] / "part-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is proven damaged"):
        newest_valid(folder, damaged=[paths[1]])


def test_a_step_folder_with_a_strange_name_is_damage(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "step-7").mkdir(parents=True)
    (folder.checkpoints / "step-00000008-a1.tmp").mkdir()
    (folder.checkpoints / "lost+found").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint's name"):
        newest_valid(folder)


def test_unknown_files_are_named_and_harmless(tmp_path: Path) -> None:
    path = checkpoint(RunFolder(tmp_path), 10)
    for name in ("notes.txt", ".nfs0001", "lost+found"):
        (path / name).write_text("")
    assert unknown_files(path) == ["notes.txt"]
    assert damage(path, deep=True) == []


def test_a_failed_read_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(RunFolder(tmp_path), 10)

    def broken(*_: object, **__: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.read", broken)
    with pytest.raises(RetryableError, match="Input/output error"):
        damage(path, deep=True)
    monkeypatch.setattr("lmscale.base.decoding.read_regular", broken)
    with pytest.raises(RetryableError):
        damage(path)


GOOD = {"format": 1, "step": 1, "attempt": 1, "files": {}}
ENTRY = {"bytes": 1, "block_bytes": 1, "crc32c": [1]}
PART = {"offsets": [0], "sizes": [1], "file": "a", "bytes": [0, 4]}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"step": "1"}, "step"),
        ({"step": -1}, "step"),
        ({"attempt": True}, "attempt"),
        ({"format": "1"}, "format"),
        ({"files": []}, "files"),
        ({"files": {"a": {}}}, "files.a"),
        ({"files": {"a": ENTRY | {"bytes": 1.5}}}, "files.a.bytes"),
        ({"files": {"a": ENTRY | {"block_bytes": 0}}}, "files.a.block_bytes"),
        ({"files": {"a": ENTRY | {"crc32c": [1, "2"]}}}, r"files.a.crc32c\[1\]"),
        ({"files": {"a": ENTRY | {"crc32c": [1 << 32]}}}, r"files.a.crc32c\[0\]"),
        ({"tensors": {"t": {"dtype": "F32", "shape": [1]}}}, "tensors.t"),
        ({"tensors": {"t": {"dtype": "F32", "shape": [-1], "parts": []}}}, "tensors.t.shape"),
        (
            {"tensors": {"t": {"dtype": "F32", "shape": [1], "parts": [PART | {"bytes": [0]}]}}},
            r"tensors.t.parts\[0\].bytes",
        ),
    ],
)
def test_a_sealed_manifest_of_wrong_types_is_damage(
    tmp_path: Path, change: dict[str, Any], place: str
) -> None:
    write_manifest(tmp_path, GOOD | change)
    with pytest.raises(CheckpointError, match=rf"manifest\.json: {place}"):
        read_manifest(tmp_path)
    assert len(damage(tmp_path, deep=True)) == 1


@pytest.mark.parametrize(
    "text", [b"", b"null", b"\xff", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"{}"]
)
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    (problem,) = damage(tmp_path, deep=True)
    assert "manifest.json" in problem


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
def test_a_file_that_never_ends_or_blocks_is_damage(tmp_path: Path, kind: str) -> None:
    def odd(path: Path) -> None:
        match kind:
            case "fifo":
                os.mkfifo(path)
            case "zero":
                path.symlink_to("/dev/zero")
            case "folder":
                path.mkdir()

    write_manifest(tmp_path, GOOD | {"files": {"a": ENTRY}})
    odd(tmp_path / "a")
    (problem,) = damage(tmp_path, deep=True)
    assert "not a regular file" in problem
    (tmp_path / "manifest.json").unlink()
    odd(tmp_path / "manifest.json")
    (problem,) = damage(tmp_path)
    assert "not a regular file" in problem


def test_a_newer_format_is_no_damage_to_fall_back_from(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"format": 2, "step": 1, "attempt": 1, "files": {}})
    with pytest.raises(ConfigError, match="update lmscale"):
        damage(tmp_path)


def test_a_name_must_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    files = {"../other": {"bytes": 0, "block_bytes": 1, "crc32c": []}}
    write_manifest(tmp_path, {"format": 1, "step": 1, "attempt": 1, "files": files})
    assert "not a plain file name" in damage(tmp_path)[0]


def test_publishing_over_an_existing_checkpoint_fails(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(folder, 10)
    with pytest.raises(OSError, match="not empty"):
        checkpoint(folder, 10)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    seen: list[int] = []
    damage(checkpoint(RunFolder(tmp_path), 10), deep=True, progress=seen.append)
    assert sum(seen) == 200


def test_listing_is_newest_first_and_says_why(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    settle(folder, claim(folder, {}), 0)
    for step in (10, 20, 30):
        checkpoint(folder, step)
    settle(folder, claim(folder, {}), 20)
    found = listing(folder)
    assert [(one.step, one.valid) for one in found] == [(30, False), (20, True), (10, True)]
    assert "attempt 2" in found[0].reason
