"""RUN/status.json as rank 0 writes it where no supervisor does."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmscale.base.errors import ExitCode, RetryableError
from lmscale.run_folder.events import EventLog
from lmscale.run_folder.paths import RunFolder
from lmscale.run_folder.rank_progress import RankProgress, new_descriptors
from lmscale.train.main import StatusReport
from lmscale.train.stop_request import StopRequest

Written = Callable[[], dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def written(folder: RunFolder) -> Written:
    return lambda: json.loads(folder.status.read_text())


def test_it_shows_starting_then_running_then_saving_then_how_it_ended(
    folder: RunFolder, written: Written
) -> None:
    progress, stop = RankProgress(), StopRequest()
    with (
        EventLog(folder, "a") as events,
        StatusReport.of_rank(events, folder, progress, stop, {}) as status,
    ):
        progress.tick("load")
        assert written()["state"] == "starting"
        progress.tick("data", 11)
        assert (written()["state"], written()["step"]) == ("running", 10)
        stop.signal = signal.SIGUSR2
        progress.tick("save")
        assert (written()["state"], written()["step"]) == ("saving", 11)
        assert "SIGUSR2" in written()["reason"]
        status.ended(ExitCode.SAVED)
        assert (written()["state"], written()["step"]) == ("stopped", 11)
        progress.tick("finish")
        assert written()["state"] == "stopped"


def test_an_error_is_the_reason_of_a_failed_start(folder: RunFolder, written: Written) -> None:
    with (
        EventLog(folder, "a") as events,
        pytest.raises(RetryableError),
        StatusReport.of_rank(events, folder, RankProgress(), StopRequest(), {}),
    ):
        raise RetryableError("a peer was lost\nmore")
    assert (written()["state"], written()["reason"]) == ("failed", "a peer was lost")


def test_a_rank_under_a_supervisor_and_ranks_other_than_zero_write_nothing(
    folder: RunFolder,
) -> None:
    progress, stop = RankProgress(), StopRequest()
    shared = RankProgress(next(iter(new_descriptors().values())))
    with EventLog(folder, "a") as events:
        for arguments in (
            (events, folder, progress, stop, {"LMSCALE_SUPERVISED": "1"}),
            (events, folder, shared, stop, {}),
            (None, folder, progress, stop, {}),
        ):
            with StatusReport.of_rank(*arguments) as status:
                progress.tick("data", 1)
                status.ended(ExitCode.DONE)
    assert not folder.status.exists()
