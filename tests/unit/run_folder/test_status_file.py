"""RUN/status.json: who may write it, and when a reader believes it."""

import json
import os
import time
from pathlib import Path

import pytest

from lmscale.base.errors import ExitCode
from lmscale.run_folder import attempts
from lmscale.run_folder.events import EventLog, events_path
from lmscale.run_folder.paths import RunFolder
from lmscale.run_folder.status_file import StatusRecord, StatusWriter, read_status, state_after_exit


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def begin(folder: RunFolder, start: str) -> None:
    with EventLog(folder, start) as events:
        events.write("start", by_hand=True)


def written(folder: RunFolder) -> dict[str, object]:
    body: dict[str, object] = json.loads(folder.status.read_text())
    return body


def read(folder: RunFolder) -> StatusRecord:
    record = read_status(folder)
    assert record is not None
    return record


def test_a_status_is_read_as_it_was_written(folder: RunFolder) -> None:
    begin(folder, "a")
    StatusWriter(folder, "a").update("running", step=7, reason="resumed")
    record = read(folder)
    assert (record.start, record.state, record.step, record.reason) == (
        "a",
        "running",
        7,
        "resumed",
    )
    assert written(folder)["format"] == 1


def test_the_file_is_written_at_a_change_and_otherwise_every_ten_seconds(folder: RunFolder) -> None:
    clock = Clock()
    writer = StatusWriter(folder, "a", clock=clock)
    writer.update("running", step=1)
    clock.now += 9
    writer.update("running", step=2)
    assert written(folder)["step"] == 1
    writer.update("saving", step=2, reason="SIGTERM")
    assert (written(folder)["state"], written(folder)["step"]) == ("saving", 2)
    clock.now += 10
    writer.update("saving", step=3, reason="SIGTERM")
    assert written(folder)["step"] == 3
    assert written(folder)["since"] == clock.now - 10


def test_a_step_that_is_not_known_keeps_the_one_before(folder: RunFolder) -> None:
    writer = StatusWriter(folder, "a")
    writer.update("running", step=5)
    writer.update("failed", reason="exit code 75")
    assert written(folder)["step"] == 5


def test_a_start_that_began_earlier_does_not_overwrite_a_later_one(folder: RunFolder) -> None:
    clock = Clock()
    older = StatusWriter(folder, "older", clock=clock)
    clock.now += 1
    StatusWriter(folder, "newer", clock=clock).update("running", step=1)
    older.update("failed", reason="exit code 1")
    assert written(folder)["start"] == "newer"


def test_the_status_of_an_older_start_is_not_believed(folder: RunFolder) -> None:
    begin(folder, "older")
    StatusWriter(folder, "older").update("running", step=1)
    assert read_status(folder) is not None
    begin(folder, "newer")
    assert read_status(folder) is None


def test_a_run_whose_heartbeat_is_old_is_lost(folder: RunFolder) -> None:
    begin(folder, "a")
    clock = Clock()
    clock.now -= 3720
    StatusWriter(folder, "a", clock=clock).update("running", step=4)
    os.utime(events_path(folder, "a"), (clock.now, clock.now))
    record = read(folder)
    assert record.state == "lost"
    assert record.step == 4
    assert "no heartbeat for 1h02m" in record.reason


def test_a_final_state_does_not_become_lost(folder: RunFolder) -> None:
    begin(folder, "a")
    clock = Clock()
    clock.now -= 3600
    StatusWriter(folder, "a", clock=clock).update("finished", step=4)
    os.utime(events_path(folder, "a"), (clock.now, clock.now))
    assert read(folder).state == "finished"


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"step": "4"}, {"step": True}, {"state": "asleep"}, {"since": None},
        {"time": float("nan")}, {"time": 10**400}, {"pid": 1.5}, {"reason": 3},
    ],
)  # fmt: skip
def test_a_file_with_wrong_types_counts_as_absent(
    folder: RunFolder, change: dict[str, object]
) -> None:
    begin(folder, "a")
    StatusWriter(folder, "a").update("running", step=4)
    folder.status.write_text(json.dumps(written(folder) | change))
    assert read_status(folder) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 60_000, '{"format": 1}'])
def test_a_torn_file_counts_as_absent(folder: RunFolder, text: str) -> None:
    begin(folder, "a")
    folder.status.write_text(text)
    assert read_status(folder) is None


def test_a_pipe_in_its_place_does_not_block_the_reader(folder: RunFolder) -> None:
    begin(folder, "a")
    os.mkfifo(folder.status)
    assert read_status(folder) is None


def test_a_write_that_fails_is_logged_once(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.status.mkdir()
    writer = StatusWriter(folder, "a")
    writer.update("running")
    writer.update("saving")
    assert [record.message.count("cannot be written") for record in caplog.records] == [1]
    assert not list(folder.path.glob(".status.json*"))


def test_the_state_after_an_exit_code(folder: RunFolder) -> None:
    number = attempts.claim(folder, {})
    attempts.settle(folder, number, 0)
    assert state_after_exit(folder, ExitCode.DONE, scheduled=False) == (
        "stopped",
        "at train.stop_at",
    )
    attempts.mark_finished(folder, number, 10)
    assert state_after_exit(folder, ExitCode.DONE, scheduled=False) == ("finished", "")
    assert state_after_exit(folder, ExitCode.SAVED, scheduled=False)[0] == "stopped"
    assert state_after_exit(folder, ExitCode.RETRY, scheduled=False) == ("failed", "exit code 75")
    assert state_after_exit(folder, ExitCode.SAVED, scheduled=True)[0] == "waiting"
    assert state_after_exit(folder, ExitCode.RETRY, scheduled=True)[0] == "waiting"
    folder.stop.parent.mkdir(exist_ok=True)
    folder.stop.write_text("")
    assert state_after_exit(folder, ExitCode.SAVED, scheduled=True)[0] == "stopped"
