"""`lmscale status` and `lmscale logs`, as somebody sees them who watches a run live through things."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import LMSCALE, Job, clean_env, lmscale, rank_pids, small_run, wait_until

_MOVES = re.compile(r"\x1b\[(\d*)([A-Za-z])")


class Terminal:
    """A program on a terminal of a given size, and what stands on its screen."""

    def __init__(self, argv: list[str], cwd: Path, *, columns: int, rows: int) -> None:
        ours, theirs = pty.openpty()
        self._ours = ours
        self.resize(columns, rows)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *argv], cwd=cwd, env=clean_env(TERM="xterm"),
            stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        self.raw, self.longest, self._lines = "", 0, [""]
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def screen(self) -> str:
        return "\n".join(self._lines)

    def press_ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)
        self._thread.join(timeout=10)
        os.close(self._ours)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:  # the program has ended
                return
            if not data:
                return
            self.raw += data.decode(errors="replace")
            self._draw(self.raw)

    def _draw(self, text: str) -> None:
        """Draw all that was ever written, from the beginning: simple, and short enough here."""
        lines, row, longest = [""], 0, 0
        at = 0
        while at < len(text):
            if move := _MOVES.match(text, at):
                at = move.end()
                match move[2]:
                    case "F":
                        row = max(row - int(move[1] or 1), 0)
                    case "J" if move[1] == "2":
                        lines, row = [""], 0
                    case "J":
                        lines = [*lines[:row], ""]
                    case "H":
                        row = 0
                continue
            if text[at] == "\n":
                row += 1
                if row == len(lines):
                    lines.append("")
            elif text[at] != "\r":
                lines[row] += text[at]
                longest = max(longest, len(lines[row]))
            at += 1
        self._lines, self.longest = lines, longest


@contextmanager
def terminal(*argv: str, cwd: Path, columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    one = Terminal([str(LMSCALE), *argv], cwd, columns=columns, rows=rows)
    try:
        yield one
    finally:
        one.close()


def status(job: Job, *argv: str) -> Any:
    done = lmscale("status", *argv, "--json", cwd=job.folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_run_watched_and_followed_through_a_kill_to_its_end(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus, train={"steps": 200}, eval={"every_steps": 1000}))
    assert status(job) == []
    process = job.start("cluster.max_restarts=3")
    job.wait_for_step(1, process)
    with (
        terminal("status", "--watch", cwd=job.folder) as watch,
        terminal("logs", "run", "-f", "--rank", "0", cwd=job.folder, columns=200) as follow,
    ):
        job.wait_for_step(30, process)
        now = status(job, "run")
        assert now["state"] == "running", now
        assert now["total_steps"] == 200 and now["step"] >= 30
        assert now["tokens_per_s"] > 0 and 0 < now["eta_s"] < 600
        assert now["restarts"] == 0 and now["checkpoint_step"] >= 28
        wait_until(lambda: "running" in watch.screen, 20, "a running row")
        os.kill(rank_pids(process.pid)[1], signal.SIGKILL)
        wait_until(lambda: status(job, "run")["restarts"] == 1, 30, "a restart")
        said, _ = process.communicate(timeout=180)
        assert process.returncode == 0, said
        wait_until(lambda: "finished" in watch.screen, 20, "a finished row")
        assert follow.process.wait(timeout=20) == 0
        watch.press_ctrl_c()
        assert watch.process.wait(timeout=10) == 0
    assert watch.raw.count("RUN ") > 3  # it was drawn again and again
    assert watch.screen.count("RUN ") == 1  # in place
    assert watch.longest < 80 and "Traceback" not in watch.raw
    assert follow.screen.count("-- start ") == 1
    assert follow.screen.index("-- start ") < follow.screen.index("resuming from step")
    assert follow.screen.count("finished 200 steps") == 1
    assert "run: finished" in follow.screen
    end = status(job, "run")
    assert (end["state"], end["step"], end["code"], end["eta_s"]) == ("finished", 200, 0, None)
    assert [one["run"] for one in status(job)] == ["run"]


@pytest.mark.slow
def test_stopped_failed_and_killed_are_told_apart(job: Job, corpus: Path) -> None:
    names = ("stopped", "failed", "killed")
    for name in names:
        Job(job.folder, name).write(small_run(corpus, train={"steps": 400}))
    stopped, failed, killed = (Job(job.folder, name) for name in names)
    process = stopped.start()
    stopped.wait_for_step(10, process)
    assert lmscale("stop", "stopped", cwd=job.folder).returncode == 0
    process.communicate(timeout=60)
    assert status(stopped, "stopped")["words"] == "stopped: by lmscale stop"

    done = failed.train("optim.lr=1e30", "optim.max_nonfinite_steps=0", "optim.warmup_steps=0")
    assert done.returncode == 86, done.stderr
    assert status(failed, "failed")["words"].startswith("failed: diverged, 86: step ")

    process = killed.start()
    killed.wait_for_step(10, process)
    process.kill()
    process.communicate(timeout=60)
    assert status(killed, "killed")["state"] == "lost"
    shown = lmscale("status", cwd=job.folder, COLUMNS="80").stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert {line.split()[0] for line in shown.splitlines() if line[0] != " "} == {"RUN", *names}
    followed = lmscale("logs", "killed", "-f", cwd=job.folder, timeout=20)
    assert followed.returncode == 0
    assert "killed: lost" in followed.stderr


@pytest.mark.slow
def test_a_job_in_the_background(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus, train={"steps": 60}))
    sent = lmscale("submit", "run.yaml", "cluster.ranks_per_node=2", cwd=job.folder)
    assert sent.returncode == 0, sent.stderr
    followed = lmscale("logs", "run", "-f", cwd=job.folder)
    assert followed.returncode == 0, followed.stderr
    assert "finished 60 steps" in followed.stdout
    assert "run: finished" in followed.stderr
    end = status(job, "run")
    assert (end["state"], end["kind"], end["nodes"], end["restarts"]) == ("finished", "local", 1, 0)


def test_no_run_folder_is_a_wrong_command(tmp_path: Path) -> None:
    for verb in ("status", "logs"):
        done = lmscale(verb, "nowhere", cwd=tmp_path)
        assert done.returncode == 78
        assert "no run folder at nowhere" in done.stderr
    alone = lmscale("status", cwd=tmp_path)
    assert alone.returncode == 0
    assert "no runs in" in alone.stdout


def test_a_watch_that_nobody_sees_tells_changes_only(tmp_path: Path) -> None:
    (tmp_path / "runs" / "r" / "events").mkdir(parents=True)
    with subprocess.Popen(
        [str(LMSCALE), "status", "--watch", "--json"], cwd=tmp_path, env=clean_env(),
        stdout=subprocess.PIPE, text=True,
    ) as watch:  # fmt: skip
        try:
            assert watch.stdout is not None
            first = json.loads(watch.stdout.readline())
            time.sleep(3)
            (tmp_path / "runs" / "r" / "stop").touch()
            (tmp_path / "runs" / "new" / "events").mkdir(parents=True)
            second = json.loads(watch.stdout.readline())
            watch.send_signal(signal.SIGINT)
            assert watch.wait(timeout=10) == 0
            assert watch.stdout.read() == ""
        finally:
            watch.kill()
    assert [one["run"] for one in first] == ["r"]
    assert [one["run"] for one in second] == ["new", "r"]
