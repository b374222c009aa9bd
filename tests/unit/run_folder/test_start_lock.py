"""A start on a file system that has no locks, as Lustre without `-o flock`."""

import errno
import logging
import os
from pathlib import Path

import pytest

from lmscale.base.errors import RetryableError
from lmscale.run_folder import liveness as hold
from lmscale.run_folder.events import read_events
from lmscale.run_folder.paths import RunFolder


@pytest.mark.parametrize(("number", "goes"), [(errno.ENOSYS, True), (errno.EIO, False)])
def test_only_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    goes: bool,
) -> None:
    def refuses(file: object, what: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("lmscale.base.fs.fcntl.flock", refuses)
    folder = RunFolder(tmp_path)
    if not goes:
        with pytest.raises(RetryableError, match="locking"):
            hold.begin_start(folder, "s", by_hand=True, ranks=1)
        return
    with caplog.at_level(logging.WARNING):
        hold.begin_start(folder, "s", by_hand=True, ranks=1).close()
    assert [event["kind"] for event in read_events(folder)] == ["start"]
    assert "file locking is not supported here" in caplog.text
