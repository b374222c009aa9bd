"""Line files: torn lines, cuts, orphans; events, liveness and the restart budget."""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.base.errors import DataError, RetryableError
from lmscale.base.proc import is_alive, started_ticks, this_host
from lmscale.base.records import LineFile, read_lines, readable_lines
from lmscale.run_folder import events as events_module
from lmscale.run_folder.events import (
    EventLog,
    events_path,
    read_events,
    start_name,
    starts_since_progress,
)
from lmscale.run_folder.liveness import live
from lmscale.run_folder.paths import RunFolder


@given(st.lists(st.integers(0, 50)), st.integers(0, 50), st.binary(max_size=20))
def test_cut_keeps_exactly_the_wanted_whole_lines(steps: list[int], last: int, torn: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        whole = "".join(json.dumps({"step": s}) + "\n" for s in steps).encode()
        path.write_bytes(whole + b'{"step": 1' + torn.replace(b"\n", b""))
        assert [x["step"] for x in read_lines(path)] == steps
        with LineFile.cut(path, lambda line: line["step"] <= last) as file:
            file.append({"step": 99})
        assert [x["step"] for x in read_lines(path)] == [s for s in steps if s <= last] + [99]
        assert os.listdir(folder) == ["metrics.jsonl"]


def test_an_orphan_writes_into_a_file_nobody_sees(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    orphan = LineFile(path)
    orphan.append({"step": 1})
    orphan.append({"step": 2})
    heir = LineFile.cut(path, lambda line: line["step"] <= 1)
    orphan.append({"step": 3, "from": "orphan"})
    orphan.sync()
    heir.append({"step": 2, "from": "heir"})
    assert list(read_lines(path)) == [{"step": 1}, {"step": 2, "from": "heir"}]
    orphan.close()
    heir.close()


def test_damage_in_the_middle_is_an_error_but_a_cut_passes_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        list(read_lines(path))
    assert [x["step"] for x in readable_lines(path)] == [1, 2]
    LineFile.cut(path, lambda line: line["step"] < 2).close()
    assert list(read_lines(path)) == [{"step": 1}]


def test_appending_after_a_torn_line_starts_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "sta')
    with LineFile(path) as file:
        file.append({"kind": "save"})
    assert [x["kind"] for x in readable_lines(path)] == ["save"]


def test_a_write_cut_short_by_a_full_disk_tears_one_line_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 5:
            return write(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    with LineFile(tmp_path / "x") as file:
        with monkeypatch.context() as patch:
            patch.setattr("os.write", full)
            with pytest.raises(OSError, match="No space"):
                file.append({"step": 1})
        file.append({"step": 2})
    assert list(readable_lines(tmp_path / "x")) == [{"step": 2}]


def test_numbers_come_back_unrounded_and_nan_as_null(tmp_path: Path) -> None:
    with LineFile(tmp_path / "x") as file:
        file.append({"loss": 0.1 + 0.2, "grad_norm": math.nan, "lr": math.inf})
    assert list(read_lines(tmp_path / "x")) == [{"loss": 0.1 + 0.2, "grad_norm": None, "lr": None}]
    assert list(read_lines(tmp_path / "absent")) == []


def test_start_names() -> None:
    assert start_name({"LMSCALE_START": "77-r1"}) == "77-r1"
    assert f"-{os.getpid()}-" in start_name({})
    assert events_path(RunFolder(Path("run")), "a/b c").name == "a_b_c.jsonl"


def test_events_come_in_the_order_of_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_events(folder) == []
    late, early = EventLog(folder, "a"), EventLog(folder, "z")
    early.write("start", ranks=2)
    late.write("save", step=10)
    assert [e["kind"] for e in read_events(folder)] == ["start", "save"]
    assert (
        read_events(folder)[0] | {"ranks": 2, "start": "z", "pid": os.getpid()}
        == (read_events(folder)[0])
    )
    late.close()
    early.close()


def test_the_heartbeat_beats_and_keeps_no_process_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "BEAT_S", 0.01)
    folder = RunFolder(tmp_path)
    with EventLog(folder, "s") as log:
        os.utime(log.path, (0, 0))
        deadline = time.monotonic() + 5
        while log.path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert log.path.stat().st_mtime > 0
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
    code = (
        "import sys; from pathlib import Path; from lmscale.run_folder.events import EventLog;"
        "from lmscale.run_folder.paths import RunFolder;"
        "EventLog(RunFolder(Path(sys.argv[1])), 'x').__enter__()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=8, check=True)


def test_events_on_a_full_disk_are_retryable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    log = EventLog(RunFolder(tmp_path), "s")
    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(RetryableError, match="free some space"):
            log.write("start")
    log.close()


def test_live_until_exit_death_or_silence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert live(folder) is None
    log = EventLog(folder, "mine")
    log.write("start")
    log.write("attempt", attempt=3)
    found = live(folder)
    assert found is not None
    assert (found.pid, found.attempt, found.start, found.here) == (os.getpid(), 3, "mine", True)
    os.utime(log.path, (time.time() - 61,) * 2)
    assert live(folder) is None
    log.beat()
    os.utime(log.path, (time.time() + 30,) * 2)  # a file server whose clock is ahead
    assert live(folder) is not None
    log.write("exit", code=0)
    assert live(folder) is None
    log.close()


def _event(folder: RunFolder, **fields: object) -> None:
    with LineFile(events_path(folder, "other")) as file:
        file.append({"time": 0.0, "kind": "start", "start": "other", **fields})


def test_a_dead_pid_of_this_host_is_not_live_but_elsewhere_only_time_tells(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _event(folder, host=this_host(), pid=ended.pid, ticks=1)
    assert live(folder) is None
    _event(folder, host="elsewhere/1", pid=ended.pid, ticks=1)
    found = live(folder)
    assert found is not None and (found.host, found.here) == ("elsewhere", False)


def test_a_reused_pid_is_not_the_process_that_wrote_it(tmp_path: Path) -> None:
    ticks = started_ticks(os.getpid())
    assert ticks is not None and is_alive(os.getpid(), ticks)
    assert not is_alive(os.getpid(), ticks - 1)
    _event(RunFolder(tmp_path), host=this_host(), pid=os.getpid(), ticks=ticks - 1)
    assert live(RunFolder(tmp_path)) is None


def test_when_the_owner_exits_its_ranks_are_gone_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _event(folder, host="elsewhere/1", pid=1)
    _event(folder, host="elsewhere/1", pid=2, kind="attempt", attempt=1)
    assert live(folder) is not None
    _event(folder, host="elsewhere/1", pid=2, kind="exit")
    assert live(folder) is not None
    _event(folder, host="elsewhere/1", pid=1, kind="exit")
    assert live(folder) is None


def start(name: str, **fields: object) -> dict[str, object]:
    return {"kind": "start", "start": name, **fields}


def save(step: int) -> dict[str, object]:
    return {"kind": "save", "start": "x", "step": step}


@pytest.mark.parametrize(
    ("events", "restarts"),
    [
        ([], 0),
        ([start("a")], 0),
        ([start("a"), start("a")], 0),  # supervisor and rank 0 report one start
        ([start("a"), start("b"), start("c")], 2),
        ([start("a"), start("b"), save(10)], 0),
        ([start("a"), save(10), start("b")], 1),
        ([start("a"), save(10), start("b"), save(20), start("c")], 1),
        ([start("a"), save(20), start("b"), save(10), start("c"), save(20), start("d")], 3),
        ([start("a"), start("b"), start("c", by_hand=True), start("d")], 1),
        ([start("a"), save(20), start("b", by_hand=True), start("c"), save(10)], 0),
    ],
)
def test_restarts_since_progress(events: list[dict[str, object]], restarts: int) -> None:
    assert starts_since_progress(events) == restarts


def test_a_file_knows_when_its_name_stands_for_another(tmp_path: Path) -> None:
    """An attempt that was asleep cuts the file of its heir: the heir's lines would be lost in silence."""
    path = tmp_path / "metrics.jsonl"
    with LineFile.cut(path, lambda line: True) as heir:
        heir.append({"step": 1})
        assert not heir.replaced()
        with LineFile.cut(path, lambda line: False) as orphan:
            assert heir.replaced()
            assert not orphan.replaced()
        path.unlink()
        assert heir.replaced()


@pytest.mark.parametrize(
    "line",
    [b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"time": NaN, "kind": "save", "start": "s"}',
     b'{"time": 1, "kind": ["save"], "start": "s"}', b'{"time": "1", "kind": "save", "start": "s"}',
     b'{"time": 1, "kind": "save", "start": "s", "step": "9"}',
     b'{"time": 1, "kind": "save", "start": "s", "step": 1e400}',
     b'{"time": 1, "kind": "start", "start": "s", "host": 3, "pid": "x"}',
     b'{"time": 1, "kind": "start", "start": "s", "host": "h", "pid": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_a_line_that_is_no_event_stops_nothing(tmp_path: Path, line: bytes) -> None:
    folder = RunFolder(tmp_path)
    with EventLog(folder, "s") as log:
        log.write("start", by_hand=True)
        with open(log.path, "ab") as file:
            file.write(line + b"\n")
        log.write("save", step=3)
        assert [event["kind"] for event in read_events(folder)] == ["start", "save"]
        assert starts_since_progress(read_events(folder)) == 0
        found = live(folder)
        assert found is not None and found.pid == os.getpid()


def test_a_save_without_a_step_is_no_progress(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("a", "b"):
        log = EventLog(folder, name)
        log.write("start", by_hand=False)
        log.write("save")
        log.close()
    assert starts_since_progress(read_events(folder)) == 1


def test_a_fifo_among_the_events_is_named_and_does_not_hang(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.events.mkdir()
    os.mkfifo(folder.events / "x.jsonl")
    for read in (read_events, live):
        with pytest.raises(DataError, match=r"x\.jsonl is a FIFO"):
            read(folder)
