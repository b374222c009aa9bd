"""Parts of a supervisor against what a long job on a large machine does to them."""

import errno
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmscale.run_folder.paths import RunFolder
from lmscale.run_folder.status_file import read_status
from lmscale_launcher.supervisor.coordinator import Coordinator
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.guard import Guard
from lmscale_launcher.supervisor.output import Output
from tests.support.stand_ins import ROOT, Start, alive, until, watched


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    yield from watched(tmp_path)


def test_signals_that_a_scheduler_sends_to_every_process_do_not_end_the_guard() -> None:
    with Guard() as guard:
        for number in (
            signal.SIGUSR1,
            signal.SIGUSR2,
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
        ):
            os.kill(guard.pid, number)  # at once: before it could have installed any handler
        time.sleep(0.2)
        assert alive([guard.pid])
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_progress_line_without_end_takes_no_memory(tmp_path: Path, in_place: bool) -> None:
    with open(os.devnull, "wb") as nowhere:
        output = Output(nowhere.fileno(), in_place=in_place)
        output.open_logs(tmp_path, "s", range(1))
        tracemalloc.start()
        for step in range(20_000):
            output.feed(0, f"\rstep {step} {'#' * 100}".encode())
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()
        output.feed(0, b"\rlast one\r")
        output.feed(0, b"\nnext line\r")
        output.feed(0, b"\n")
        output.close()
    assert (tmp_path / "s-rank-0.log").read_text() == "last one\nnext line\n"


def test_an_endless_line_is_cut(tmp_path: Path) -> None:
    with open(os.devnull, "wb") as nowhere:
        output = Output(nowhere.fileno(), in_place=False)
        output.open_logs(tmp_path, "s", range(1))
        for _ in range(100):
            output.feed(0, b"x" * (1 << 16))
        assert (tmp_path / "s-rank-0.log").stat().st_size > 5 << 20
        output.close()


def test_a_run_folder_that_cannot_be_looked_at_ends_nothing() -> None:
    class Stale:
        def exists(self) -> bool:
            raise OSError(errno.ESTALE, "Stale file handle")

    with EventLoop() as loop:
        unused: Any = None
        folder: Any = SimpleNamespace(stop=Stale())
        leader = Coordinator(
            "h", [], loop=loop, output=unused, signals=unused, folder=folder, deadline=None
        )
        leader.tick(None)
        assert not leader.stop_requested


def test_a_stray_that_does_not_die_is_not_waited_for() -> None:
    code = (
        "import os, subprocess, time\n"
        "from lmscale_launcher.supervisor.node_round import kill_orphans\n"
        "stray = subprocess.Popen(['sleep', '30'])\n"
        "kill, os.kill = os.kill, lambda pid, number: None\n"  # as in the kernel's state D
        "begun = time.monotonic(); kill_orphans(spare=set(), within_s=0.2)\n"
        "kill(stray.pid, 9); print(time.monotonic() - begun)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=20, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert 0.2 <= float(done.stdout) < 5


@pytest.mark.parametrize("asked", ["deadline", "stop file"])
def test_no_rank_is_started_when_it_would_have_to_stop_at_once(start: Start, asked: str) -> None:
    options = {"deadline": time.time() - 60} if asked == "deadline" else {}
    stage = [sys.executable, "-c", f"open({str(RunFolder(start.run).stop)!r}, 'w')"]
    more = {} if asked == "deadline" else {"stage": stage}
    code, said = start.to_the_end("mark('ran', 1)", max_restarts=3, **options, **more)
    assert code == 85, said
    assert not start.marks("ran") and start.kinds() == ["start", "exit"]


def test_twenty_restarts_leave_no_descriptor_open(start: Start) -> None:
    body = """
    parent = f"/proc/{os.getppid()}/fd"
    if rank == 0:
        with open(run / "open", "a") as file:
            file.write(f"{len(os.listdir(parent))}\\n")
    sys.exit(75)
    """
    code, said = start.to_the_end(body, ranks=1, max_restarts=20, restart_delay_s=0.0)
    assert code == 75, said
    counts = [int(text) for text in (start.run / "open").read_text().split()]
    assert len(counts) == 21 and max(counts) <= counts[0] + 1, counts


@pytest.mark.parametrize(
    ("body", "options", "code", "state", "reason"),
    [
        ("pass", {}, 0, "stopped", "at train.stop_at"),
        ("sys.exit(78)", {}, 78, "failed", "config, 78"),
        ("sys.exit(75)", {"by_hand": False}, 75, "failed", "retry, 75"),  # the budget is used up
        ("pass", {"by_hand": False, "unhealthy": ["disk: full"]}, 75, "waiting", "retry, 75: the"),
        ("sys.exit(85)", {"by_hand": True}, 85, "stopped", "saved and stopped on request"),
        # A scheduler that asked for the checkpoint (a time limit, a preemption) starts the run again.
        ("sys.exit(85)", {"by_hand": False}, 85, "waiting", "saved, 85; the scheduler may"),
    ],
)
def test_the_status_file_has_the_end_of_the_run(
    start: Start, body: str, options: dict[str, Any], code: int, state: str, reason: str
) -> None:
    ended, output = start.to_the_end(body, ranks=1, max_restarts=1 if code == 78 else 0, **options)
    assert ended == code, output
    record = read_status(RunFolder(start.run))
    assert record is not None
    assert (record.start, record.state) == ("s", state)
    assert record.reason.startswith(reason)


def test_the_status_file_follows_the_ranks(start: Start) -> None:
    body = f"""
    sys.path.insert(0, {str(ROOT)!r})
    from lmscale.run_folder.rank_progress import RankProgress
    assert os.environ["LMSCALE_SUPERVISED"] == "1"
    progress = RankProgress.inherited(os.environ)
    for step in (1, 2, 3):
        progress.tick("data", step), progress.tick("step")
    mark("stepped", 1)
    wait()
    """
    process = start.launch(body, ranks=1)
    start.wait_for("stepped", 1)
    folder = RunFolder(start.run)

    def state() -> tuple[str, int | None]:
        record = read_status(folder)
        return (record.state, record.step) if record is not None else ("", None)

    until(lambda: state() == ("running", 2), "the state running")
    folder.stop.write_text("")
    until(lambda: state()[0] in ("saving", "failed"), "the state saving")
    process.communicate(timeout=20)
    assert state()[0] == "failed"
