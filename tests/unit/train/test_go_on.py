"""From which checkpoint a start goes on, and what it refuses; without ranks and without a model."""

import os
import time
from pathlib import Path
from typing import Any, cast

import pytest

from lmscale.base.errors import CheckpointError, ConfigError, Diverged, LmscaleError
from lmscale.base.world import World
from lmscale.config.identity import total_steps
from lmscale.config.run_file import load
from lmscale.run_folder.checkpoints import write_manifest
from lmscale.run_folder.events import EventLog, read_events
from lmscale.run_folder.paths import RunFolder
from lmscale.train.main import by_hand, recorded
from lmscale.train.restore import (
    ResumePoint,
    TrainedModel,
    TrainState,
    check_tokenizer,
    choose,
    note_changes,
    resumed_state,
)
from lmscale.train.run_context import RunContext


def rank_of(folder: Path, *overrides: str) -> RunContext:
    cfg = load("smoke", [f"train.run_dir={folder / 'run'}", *overrides])
    return RunContext(cfg, cast(Any, None), cast(Any, None), RunFolder(folder / "run"), None)


def checkpoint(path: Path, **body: Any) -> Path:
    path.mkdir(parents=True)
    write_manifest(path, {"format": 1, "step": 10, "attempt": 1, "files": {}, **body})
    return path


def test_a_checkpoint_of_another_run_that_is_damaged_is_not_tried_again(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "other" / "checkpoints" / "step-00000010-a1")
    rank = rank_of(tmp_path, f"train.resume={path}")
    found = choose(rank)
    assert found is not None
    assert found.foreign
    with pytest.raises(CheckpointError, match=r"train\.resume.*damaged"):
        choose(rank, damaged=frozenset({path}))


@pytest.mark.parametrize("name", ["Auto", "other", "other/checkpoints/step-00000011-a1"])
def test_what_is_no_checkpoint_is_a_mistake_not_damage(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path / "other" / "checkpoints" / "step-00000010-a1")
    with pytest.raises(ConfigError, match=r"train\.resume"):
        choose(rank_of(tmp_path, f"train.resume={tmp_path / name}"))


def test_a_changed_batch_is_entered_in_the_journal_where_it_begins(tmp_path: Path) -> None:
    before, now = {"train.global_batch_size": 8, "optim.lr": 1.0}, {"train.global_batch_size": 16}
    now["optim.lr"] = before["optim.lr"]
    stands = TrainState(step=20, position=160, streams=8).as_json()
    body = {"identity": before, "state": {"train": stands}}
    source = ResumePoint(tmp_path, 20, body)
    state = resumed_state(source, load("smoke"))
    note_changes(state, source, now)
    entry = {"position": 160, "step": 20, "key": "train.global_batch_size", "before": 8, "now": 16}
    assert state.journal == [entry]
    assert TrainState.from_json(state.as_json()) == state
    unchanged = resumed_state(source, load("smoke"))
    note_changes(unchanged, source, before)
    assert unchanged.journal == []
    note_changes(unchanged, None, now)
    assert unchanged.journal == []


def test_streams_that_are_asked_for_are_never_ignored(tmp_path: Path) -> None:
    body = {"state": {"train": TrainState(step=20, position=160, streams=8).as_json()}}
    assert resumed_state(ResumePoint(tmp_path, 20, body), load("smoke")).streams == 8
    assert (
        resumed_state(ResumePoint(tmp_path, 20, body), load("smoke", ["data.streams=4"])).streams
        == 4
    )


def test_the_length_in_tokens_counts_what_was_read_in_other_batches() -> None:
    cfg = load("smoke", ["train.steps=null", "train.tokens=256000", "train.global_batch_size=16"])
    assert total_steps(cfg, lambda: 0) == 63  # 1,000 samples
    assert total_steps(cfg, lambda: 0, step=62, position=992) == 63
    assert total_steps(cfg, lambda: 0, step=50, position=400) == 50 + 38
    epochs = load("smoke", ["train.steps=null", "train.epochs=0.5", "train.global_batch_size=16"])
    assert total_steps(epochs, lambda: 2000) == 63


def test_a_start_by_hand_without_a_supervisor_takes_up_a_stopped_run(tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    for one in (folder, other):
        one.path.mkdir()
        one.stop.touch()
    with recorded(folder, World(start="job.1"), {"LMSCALE_START": "job.1"}):
        assert folder.stop.exists(), "a scheduler's start is not the user's word"
    with recorded(other, World(), {}):
        assert not other.stop.exists()
        with pytest.raises(ConfigError, match="lmscale stop"), recorded(other, World(), {}):
            pass
    assert [e["by_hand"] for e in read_events(other)] == [True]
    with recorded(folder, World(rank=1, local_rank=1, size=2, local_size=2), {}) as events:
        assert events is None


def test_a_restart_by_torchrun_is_not_by_hand() -> None:
    assert by_hand(World(), {"TORCHELASTIC_RESTART_COUNT": "0"})
    assert not by_hand(World(), {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert not by_hand(World(start="job.1"), {})


def test_a_start_without_a_supervisor_waits_for_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    monkeypatch.setattr("lmscale.run_folder.events.this_host", lambda: "elsewhere/1")
    with EventLog(folder, "other") as other:
        other.write("start")
    monkeypatch.undo()
    slept = []

    def silent(seconds: float) -> None:
        slept.append(seconds)
        os.utime(other.path, (time.time() - 61,) * 2)

    monkeypatch.setattr("lmscale.run_folder.liveness.time.sleep", silent)
    with recorded(folder, World(), {}):
        assert len(slept) == 1


def test_how_a_start_failed_is_recorded_and_a_full_disk_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(Diverged), recorded(folder, World(), {}):
        raise Diverged("step 3")
    assert read_events(folder)[-1]["code"] == 86

    def full(*_: object, **__: object) -> None:
        raise LmscaleError("no space left")

    def fails() -> None:
        with recorded(RunFolder(tmp_path / "other"), World(), {}) as events:
            assert events is not None
            monkeypatch.setattr(events, "write", full)
            raise Diverged("step 3")

    with pytest.raises(Diverged):
        fails()


def test_another_tokenizer_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    trained = TrainedModel(tmp_path, 10, load("smoke"), {"identity": {"data.tokenizer": "c0ffee"}})
    check_tokenizer(trained, "c0ffee")
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        check_tokenizer(trained, "70c")
