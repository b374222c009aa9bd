"""Where a plan goes on from: the newest checkpoint, its journal, and what a start would refuse."""

from pathlib import Path
from typing import Any

import pytest

from lmscale.base.errors import ConfigError
from lmscale.config.run_file import load
from lmscale.config.schema import RunConfig
from lmscale.corpus.schedule import Phase, step_start
from lmscale.run_folder.checkpoints import write_manifest
from lmscale_launcher.planner.planned_resume import resume_point

ALLOW = "train.allow_change=[train.global_batch_size]"


def config(folder: Path, *overrides: str) -> RunConfig:
    return load("smoke", [f"train.run_dir={folder / 'run'}", *overrides])


def change(step: int, position: int, before: int, now: int) -> dict[str, Any]:
    where = {"step": step, "position": position}
    return {**where, "key": "train.global_batch_size", "before": before, "now": now}


def checkpoint(path: Path, step: int, batch: int, *journal: dict[str, Any], position: int) -> Path:
    path.mkdir(parents=True)
    train = {"step": step, "position": position, "streams": 8, "journal": list(journal)}
    identity = {"train.global_batch_size": batch, "data.streams": 8}
    body = {"step": step, "attempt": 1, "identity": identity, "state": {"train": train}}
    write_manifest(path, {"format": 1, "files": {}, **body})
    return path


def test_a_new_run_stands_at_its_start(tmp_path: Path) -> None:
    found = resume_point(config(tmp_path))
    assert (found.streams, found.step, found.position) == (8, 0, 0)
    assert found.phases == (Phase(8),)
    assert resume_point(config(tmp_path, "data.streams=4")).streams == 4


def test_the_journal_is_the_past_and_the_run_file_what_is_to_come(tmp_path: Path) -> None:
    entries = (
        change(20, 160, 8, 16),
        {**change(22, 192, 1, 2), "key": "optim.lr"},
        change(25, 240, 16, 8),
    )
    checkpoint(tmp_path / "run/checkpoints/step-00000030-a1", 30, 8, *entries, position=280)
    same = resume_point(config(tmp_path))
    assert same.phases == (Phase(8), Phase(16, 20, 160), Phase(8, 25, 240))
    assert (same.step, same.position, same.streams) == (30, 280, 8)
    other = resume_point(config(tmp_path, "train.global_batch_size=32", ALLOW))
    assert other.phases == (*same.phases, Phase(32, 30, 280))
    assert [step_start(step, other.phases) for step in (1, 20, 21, 25, 26, 30, 31, 32)] == [
        (0, 8), (152, 8), (160, 16), (224, 16), (240, 8), (272, 8), (280, 32), (312, 32),
    ]  # fmt: skip


def test_two_changes_at_one_step_count_once(tmp_path: Path) -> None:
    entries = change(20, 160, 8, 16), change(20, 160, 16, 4)
    checkpoint(tmp_path / "run/checkpoints/step-00000020-a1", 20, 4, *entries, position=160)
    phases = resume_point(config(tmp_path, "train.global_batch_size=4")).phases
    assert step_start(20, phases) == (152, 8)
    assert step_start(21, phases) == (160, 4)


def test_a_batch_that_train_would_refuse_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run/checkpoints/step-00000020-a1", 20, 8, position=160)
    with pytest.raises(ConfigError, match=r"16, but .*trained with 8"):
        resume_point(config(tmp_path, "train.global_batch_size=16"))


def test_another_runs_checkpoint_is_where_a_new_folder_begins(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "other/checkpoints/step-00000020-a1", 20, 8, position=160)
    found = resume_point(
        config(tmp_path, f"train.resume={path}", "train.global_batch_size=16", ALLOW)
    )
    assert (found.step, found.phases) == (20, (Phase(8), Phase(16, 20, 160)))
    with pytest.raises(ConfigError, match=r"train\.resume"):
        resume_point(config(tmp_path, f"train.resume={tmp_path / 'nothing'}"))
