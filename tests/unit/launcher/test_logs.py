"""`lmscale logs`: the newest log of a run, and what comes, through starts, truncation and rotation."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.base.proc import this_host
from lmscale.base.records import begin_of_last
from lmscale.run_folder.events import EventLog
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.job import JobRecord
from lmscale_launcher.jobs.job_plan import write_record
from lmscale_launcher.jobs.logs import FollowedFile, LogFile, as_object

ROOT = Path(__file__).parents[3]


class Run:
    """A run folder whose starts are this very process, so that they live."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.folder.logs.mkdir(parents=True)
        self.events: EventLog | None = None

    def start(self, name: str, *, by_hand: bool = True) -> None:
        if self.events is not None:
            self.events.close()
        self.events = EventLog(self.folder, name)
        self.events.write("start", by_hand=by_hand, ranks=2)

    def end(self, code: int) -> None:
        assert self.events is not None
        self.events.write("exit", code=code, reason="")
        self.events.close()

    def write(self, name: str, *lines: str) -> None:
        with (self.folder.logs / name).open("a") as file:
            file.writelines(f"{line}\n" for line in lines)

    def submit(self, number: int = 1) -> None:
        """A job of this host, run by this process."""
        from lmscale.base.proc import started_ticks, this_host

        facts = {"host": this_host(), "ticks": started_ticks(os.getpid())}
        record = JobRecord(number, "local", str(os.getpid()), "here", time.time(), 1, 1, 2, facts)
        write_record(self.folder, record)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "runs" / "r")
    yield made
    if made.events is not None:
        made.events.close()


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "lmscale", "logs", *argv]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def shown(run: Run, *argv: str, code: int = 0) -> str:
    done = subprocess.run(
        command("r", *argv), cwd=run.folder.path.parents[1], env=environment(), capture_output=True,
        text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 and done.stdout else done.stderr


class Follower:
    """`lmscale logs -f`, line by line."""

    def __init__(self, run: Run, *argv: str) -> None:
        self.process = subprocess.Popen(
            command("r", "-f", *argv), cwd=run.folder.path.parents[1], env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def next(self, timeout: float = 15) -> str | None:
        return self._lines.get(timeout=timeout)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)
        self._thread.join(timeout=10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def take(self, count: int) -> list[str | None]:
        return [self.next() for _ in range(count)]


@pytest.fixture
def follow(run: Run) -> Iterator[Any]:
    followers: list[Follower] = []

    def start(*argv: str) -> Follower:
        followers.append(Follower(run, *argv))
        return followers[-1]

    yield start
    for one in followers:
        one.close()


def test_the_whole_log_of_rank_0_or_of_another(run: Run) -> None:
    run.start("old")
    run.write("old-rank-0.log", "old")
    run.end(85)
    time.sleep(0.01)
    run.start("new")
    run.write("new-rank-0.log", *(f"line {n}" for n in range(50)))
    run.write("new-rank-1.log", "from one")
    os.utime(run.folder.logs / "old-rank-0.log", (time.time() + 9, time.time() + 9))  # an orphan's
    assert shown(run).splitlines() == [f"line {n}" for n in range(50)]
    assert shown(run, "--rank", "1") == "from one\n"
    told = [json.loads(line) for line in shown(run, "--rank", "1", "--json").splitlines()]
    assert told == [{"rank": 1, "start": "new", "line": "from one"}]
    run.end(0)
    assert "ranks with a log: 0, 1" in shown(run, "--rank", "7", code=78)


def test_the_newest_jobs_merged_log_until_somebody_starts_by_hand(run: Run) -> None:
    run.write("job-1.log", "first job")
    run.submit(1)
    run.submit(2)
    run.write("job-2.log", "plain", "[r1] from one", "[n2:3] from three")
    run.start("local-2", by_hand=False)
    run.write("local-2-rank-0.log", "of rank 0")
    assert shown(run) == "plain\n[r1] from one\n[n2:3] from three\n"
    assert [json.loads(line) for line in shown(run, "--json").splitlines()] == [
        {"line": "plain"},
        {"rank": 1, "line": "from one"},
        {"rank": 3, "node": "n2", "line": "from three"},
    ]
    run.end(85)
    run.start("by-hand")
    run.write("by-hand-rank-0.log", "by hand")
    assert shown(run) == "by hand\n"


def test_without_a_log_it_says_why(run: Run, tmp_path: Path) -> None:
    run.submit()
    assert shown(run).startswith("no log yet: ")
    nothing = subprocess.run(
        command("nowhere"), cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert nothing.returncode == 78
    assert "no run folder" in nothing.stderr


def test_a_withdrawn_job_has_no_log_and_none_is_waited_for(run: Run, follow: Any) -> None:
    gone = JobRecord(1, "local", "999999999", "here", time.time(), 1, 1, 2, {"host": this_host()})
    write_record(run.folder, gone)
    run.folder.stop.touch()
    want = "no log: stopped: by lmscale stop, before it started\n"
    assert shown(run) == want
    done = subprocess.run(
        command("r", "-f"), cwd=run.folder.path.parents[1], env=environment(), capture_output=True,
        text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(want)


def test_an_empty_log_is_no_riddle_and_mpirun_has_none_of_a_rank(run: Run) -> None:
    run.start("new")
    run.write("new-rank-1.log")
    assert "rank 1 has said nothing so far" in shown(run, "--rank", "1")
    run.end(85)
    run.write("mpi-1-rank-0.log", "of all ranks")
    assert "ranks with a log: 1" in shown(run, "--rank", "0", code=78)


def test_following_across_restarts_until_the_run_has_ended(run: Run, follow: Any) -> None:
    run.start("s")
    run.write("s-rank-1.log", *(f"a{n}" for n in range(30)))
    one = follow("--rank", "1")
    assert one.take(20) == [f"a{n}" for n in range(10, 30)]
    with (run.folder.logs / "s-rank-1.log").open("a") as file:
        file.write("whole\nto")
        file.flush()
        assert one.next() == "whole"
        file.write("rn\n")
    assert one.next() == "torn"
    assert run.events is not None
    run.events.write("restart", code=75)
    run.write("s-rank-1.log", "last words")
    run.start("s.1")
    run.write("s.1-rank-1.log", "again")
    assert one.take(3) == ["last words", "-- start s.1 --", "again"]
    run.write("s.1-rank-1.log", "done")
    run.end(85)
    assert one.take(3) == ["done", "r: stopped: saved and stopped on request, 85", None]
    assert one.process.wait(timeout=10) == 0


def test_following_a_job_that_has_not_said_anything_yet(run: Run, follow: Any) -> None:
    run.submit()
    one = follow()
    assert one.next().startswith("no log yet: starting")
    run.write("job-1.log", "hello")
    assert one.next() == "hello"
    run.start("local-1", by_hand=False)
    assert one.next() == "-- start local-1 --"
    run.write("job-1.log", "and on")
    run.end(65)
    run.write("job-1.log", "late")
    assert one.take(3) == ["and on", "late", "r: failed: damaged data, 65"]
    assert one.process.wait(timeout=10) == 0


def test_what_has_ended_is_not_waited_for(run: Run, follow: Any) -> None:
    run.start("s")
    run.write("s-rank-0.log", "x")
    run.end(86)
    begun = time.monotonic()
    one = follow("--json")
    assert json.loads(one.next()) == {"rank": 0, "start": "s", "line": "x"}
    assert one.next() == "r: failed: diverged, 86"
    assert one.process.wait(timeout=10) == 0
    assert time.monotonic() - begun < 10


def test_ctrl_c_ends_quietly(run: Run, follow: Any) -> None:
    run.start("s")
    run.write("s-rank-0.log", "x")
    one = follow()
    assert one.next() == "x"
    one.process.send_signal(signal.SIGINT)
    assert one.next() is None
    assert one.process.wait(timeout=10) == 0


def test_a_reader_that_leaves_is_no_error(run: Run) -> None:
    run.start("s")
    run.write("s-rank-0.log", *("x" * 99 for _ in range(9999)))
    done = subprocess.run(
        f"{sys.executable} -m lmscale logs r | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=run.folder.path.parents[1], env=environment(),
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["x" * 99, "0"]
    assert done.stderr == ""


def test_truncated_rotated_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    growing = FollowedFile(path)
    assert growing.lines() == []
    path.write_text("a\nb\nc")
    assert growing.lines() == [b"a", b"b"]
    path.write_text("n\n")  # truncated in place
    assert growing.lines() == [b"n"]
    path.rename(tmp_path / "log.1")
    with (tmp_path / "log.1").open("a") as file:
        file.write("to the old one\nand half")
    path.write_text("new\n")
    assert growing.lines() == [b"to the old one", b"and half", b"new"]
    path.unlink()
    assert growing.lines() == []
    path.write_text("again\n")
    assert growing.lines() == [b"again"]
    growing.close()


@given(
    lines=st.lists(st.binary(max_size=9).filter(lambda b: b"\n" not in b), max_size=30),
    rest=st.binary(max_size=5).filter(lambda b: b"\n" not in b),
    cuts=st.lists(st.integers(0, 300), max_size=5),
)
def test_however_it_grows_each_line_comes_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], rest: bytes, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("grow") / "log"
    data = b"".join(line + b"\n" for line in lines) + rest
    growing, found, at = FollowedFile(path), [], 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        with path.open("ab") as file:
            file.write(data[at:cut])
        at = cut
        found += growing.lines()
    assert found == lines
    assert growing.rest() == ([rest] if rest else [])
    growing.close()


@given(count=st.integers(0, 60), last=st.integers(1, 60), torn=st.booleans())
def test_the_last_lines_begin_where_they_do(
    tmp_path_factory: pytest.TempPathFactory, count: int, last: int, torn: bool
) -> None:
    path = tmp_path_factory.mktemp("last") / "log"
    path.write_bytes(b"".join(b"%d\n" % n for n in range(count)) + b"torn" * torn)
    with path.open("rb") as file:
        file.seek(begin_of_last(file, last))
        found = file.read().splitlines()
    want = [b"%d" % n for n in range(count)][-last:]
    assert found == want + [b"torn"] * torn


def test_a_mark_is_only_taken_off_merged_lines() -> None:
    merged, own = LogFile(Path("job-1.log"), None, None), LogFile(Path("s-rank-2.log"), 2, "s")
    assert as_object("[n1:0] x", merged, start="s") == {
        "rank": 0, "node": "n1", "start": "s", "line": "x",
    }  # fmt: skip
    assert as_object("[n1:0] x", own, start=None)["line"] == "[n1:0] x"
    assert as_object("[note] x", merged, start=None) == {"line": "[note] x"}
