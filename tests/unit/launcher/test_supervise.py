"""The supervisor of one node, with stand-in ranks: plain scripts without torch, and real signals."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmscale.run_folder.paths import RunFolder
from tests.support.stand_ins import ROOT, Start, alive, clean_env, mentioning, until, watched


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    yield from watched(tmp_path)


def test_ranks_get_their_environment_and_logs_are_merged(start: Start) -> None:
    code, said = start.to_the_end(
        """
        mark("env", json.dumps({k: v for k, v in os.environ.items()}))
        print(f"hello from {rank}")
        print("[r1] already prefixed" if rank else "bare", file=sys.stderr)
        print("no line end", end="")
        """
    )
    assert code == 0, said
    envs = {rank: json.loads(text) for rank, text in start.marks("env").items()}
    wanted = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "LMSCALE_START": "s",
    }
    for rank in (0, 1):
        assert envs[rank] | wanted | {"RANK": str(rank), "LOCAL_RANK": str(rank)} == envs[rank]
        assert int(envs[rank]["OMP_NUM_THREADS"]) >= 1
        assert envs[rank]["PYTHONUNBUFFERED"] == "1"
    assert envs[0]["MASTER_PORT"] == envs[1]["MASTER_PORT"]
    assert set(said.splitlines()) == {
        "hello from 0", "bare", "no line end", "[r1] hello from 1", "[r1] already prefixed",
        "[r1] no line end",
    }  # fmt: skip
    log = (start.run / "logs" / "s-rank-1.log").read_text()
    assert log.splitlines() == ["hello from 1", "[r1] already prefixed", "no line end"]
    assert start.kinds() == ["start", "exit"]
    assert start.events()[-1]["code"] == 0


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(78 if rank else 75)", 78),
        ("sys.exit(85)", 85),
        ("sys.exit(87 if rank else 1)", 87),
        ("os.kill(os.getpid(), 9) if rank else wait()", 137),
        ("sys.exit(75) if rank else wait()", 75),  # the peer that we end is not the cause
        ("sys.exit(65) if rank else (signal.signal(15, signal.SIG_IGN), wait())", 65),
    ],
)
def test_the_decisive_code_is_returned(start: Start, body: str, code: int) -> None:
    got, said = start.to_the_end(body)
    assert got == code, said


def test_a_rank_that_ends_well_does_not_end_its_peers(start: Start) -> None:
    code, said = start.to_the_end("mark('done', 1) if not rank else (wait(0.5), mark('done', 1))")
    assert code == 0, said
    assert len(start.marks("done")) == 2


FAMILY = """
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)", str(run)])
mark("child", child.pid)
mark("pid", os.getpid())
{end}
"""


def test_sigkill_of_the_supervisor_ends_ranks_and_their_children(start: Start) -> None:
    process = start.launch(FAMILY.format(end="wait()"))
    pids = [int(t) for name in ("child", "pid") for t in start.wait_for(name, 2).values()]
    assert len(alive(pids)) == 4
    os.kill(process.pid, signal.SIGKILL)
    # a dying process loses its command line a moment before it counts as dead
    until(lambda: not mentioning(start.run) and not alive(pids), "all have ended")
    process.communicate()


def test_ranks_end_with_their_supervisor_even_without_the_guard(start: Start) -> None:
    process = start.launch("mark('pid', os.getpid()); wait()")
    pids = [int(text) for text in start.wait_for("pid", 2).values()]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (guard,) = {int(pid) for pid in children} - set(pids)
    for pid in (guard, process.pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pids), "the ranks have ended")
    process.communicate()


def test_sigkill_of_a_rank_ends_the_rest(start: Start) -> None:
    process = start.launch(FAMILY.format(end="wait()"))
    pids = start.wait_for("pid", 2)
    children = start.wait_for("child", 2)
    os.kill(int(pids[1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 137, said
    assert "rank 1 has ended (died by SIGKILL, 137)" in said
    assert not alive([int(t) for t in [*pids.values(), *children.values()]])


def test_children_left_by_ranks_are_ended_even_in_other_sessions(start: Start) -> None:
    code, said = start.to_the_end(
        """
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", "import time; time.sleep(60)", str(run)],
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        mark("child", child.pid)
        """
    )
    assert code == 0, said
    assert not alive([int(text) for text in start.marks("child").values()])


STOPPABLE = """
got = []
def on(number, frame):
    got.append(number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, on)
mark("ready", 1)
while not got:
    time.sleep(0.01)
time.sleep(0.3)
mark("got", got)
sys.exit(85)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_reach_each_rank_once(start: Start, number: signal.Signals) -> None:
    process = start.launch(STOPPABLE, max_restarts=5)
    start.wait_for("ready", 2)
    for _ in range(3):  # the whole group, as from a terminal, and repeats of it
        os.killpg(process.pid, number)
        time.sleep(0.02)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 85, said
    assert start.marks("got") == {0: f"[{int(number)}]", 1: f"[{int(number)}]"}


def test_a_closed_terminal_saves_and_stops(start: Start) -> None:
    process = start.launch(STOPPABLE)
    start.wait_for("ready", 2)
    os.kill(process.pid, signal.SIGHUP)
    assert process.communicate(timeout=10)
    assert process.returncode == 85
    assert start.marks("got") == {0: "[15]", 1: "[15]"}


def test_the_stop_file_is_seen_and_nothing_starts_again(start: Start) -> None:
    process = start.launch(STOPPABLE, max_restarts=5)
    start.wait_for("ready", 2)
    RunFolder(start.run).stop.touch()
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 85, said
    again, said = start.to_the_end("mark('ran', 1)", by_hand=False, start="sched-1")
    assert again == 0
    assert "stopped by `lmscale stop`" in said
    assert not start.marks("ran")
    by_hand, said = start.to_the_end("mark('ran', 1)")
    assert by_hand == 0, said
    assert len(start.marks("ran")) == 2
    assert not RunFolder(start.run).stop.exists()


COUNTING = """
with open(run / "starts", "a") as file:
    file.write(os.environ["LMSCALE_START"] + "\\n")
starts = (run / "starts").read_text().split()
"""


@pytest.mark.parametrize(
    ("code", "starts"), [(75, 3), (1, 3), (137, 3), (78, 1), (65, 1), (86, 1), (87, 1), (2, 1)]
)
def test_restarts_in_place_within_the_budget(start: Start, code: int, starts: int) -> None:
    end = "os.kill(os.getpid(), 9)" if code == 137 else f"sys.exit({code})"
    got, said = start.to_the_end(COUNTING + end, ranks=1, max_restarts=2)
    assert got == code, said
    assert (start.run / "starts").read_text().split() == ["s", "s.1", "s.2"][:starts]
    kinds = start.kinds()
    assert kinds == ["start", "restart"] * (starts - 1) + ["start", "exit"]
    assert [e["by_hand"] for e in start.events() if e["kind"] == "start"] == [True, False, False][
        :starts
    ]


def test_progress_renews_the_budget(start: Start) -> None:
    body = (
        COUNTING + "event('save', step=10 * len(starts)) if len(starts) < 4 else None\nsys.exit(1)"
    )
    got, said = start.to_the_end(body, ranks=1, max_restarts=1)
    assert got == 1, said
    assert len((start.run / "starts").read_text().split()) == 4  # three saved; one restart in vain
    assert "cluster.max_restarts=1" in said


def test_a_restart_that_works_ends_well(start: Start) -> None:
    body = COUNTING + "sys.exit(75 if len(starts) == 1 else 0)"
    code, said = start.to_the_end(body, ranks=1, max_restarts=1)
    assert code == 0, said


def test_a_signal_while_waiting_for_a_restart_ends_it(start: Start) -> None:
    process = start.launch(
        "mark('ran', 1); sys.exit(75)", ranks=1, max_restarts=3, restart_delay_s=30.0
    )
    start.wait_for("ran", 1)
    until(lambda: "restart" in [e["kind"] for e in start.events()], "a restart is planned")
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 75
    assert start.events()[-1]["kind"] == "exit"


def test_nobody_can_take_the_ranks_port_before_they_meet(start: Start) -> None:
    body = """
    mark("port", os.environ["MASTER_PORT"])
    while not (run / "tried").exists():
        time.sleep(0.01)
    """
    process = start.launch(body, ranks=2)
    port = int(start.wait_for("port", 2)[0])
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(family) as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("", port))
    (start.run / "tried").touch()
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 0, said


def test_who_dials_a_dead_rank_0_is_told_at_once(start: Start) -> None:
    body = """
    import socket
    if rank == 0:
        while not (run / "marks" / "there-1").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    there = socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    mark("there", 1)
    try:
        there.recv(1)
    except ConnectionResetError:
        sys.exit(75)
    """
    code, said = start.to_the_end(body, ranks=2, max_restarts=0)
    assert code == 137, said
    assert not start.events()[-1]["codes"].keys() - {"0", "1"}
    assert start.events()[-1]["codes"]["1"] == 75, "no signal was needed to end it"


def test_two_simultaneous_starts_do_not_both_win(start: Start) -> None:
    body = "mark('rank', os.environ['LMSCALE_START']); time.sleep(1.5)"
    both = [start.launch(body, ranks=1, start=name) for name in ("a", "b", "c")]
    said = [process.communicate(timeout=20)[0] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 78, 78], said
    refused = said[[p.returncode for p in both].index(78)]
    assert "lmscale stop" in refused
    assert "pid" in refused
    assert [e["kind"] for e in start.events()].count("start") == 1


def test_a_schedulers_start_takes_over_at_once(start: Start) -> None:
    first = start.launch("mark('first', 1); wait()", ranks=1)
    start.wait_for("first", 1)
    code, said = start.to_the_end("mark('second', 1)", ranks=1, by_hand=False, start="job-1")
    assert code == 0, said
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()


def test_after_a_killed_supervisor_the_next_start_needs_no_waiting(start: Start) -> None:
    first = start.launch("mark('first', 1); wait()", ranks=1)
    start.wait_for("first", 1)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    code, said = start.to_the_end("pass", ranks=1, start="t")
    assert code == 0, said


def test_rank_0_sees_a_terminal_where_the_user_does(start: Start) -> None:
    ours, theirs = os.openpty()
    body = """
    if rank == 0:
        sys.stderr.write(f"\\r\\x1b[Kstep 1 {sys.stderr.isatty()}")
        sys.stderr.write(f"\\r\\x1b[Kstep 2 {sys.stderr.isatty()}\\n")
    """
    process = subprocess.Popen(
        start.options(body), cwd=ROOT, env=clean_env(), stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # EIO: all of theirs are closed
            break
    assert process.wait(timeout=10) == 0, said
    os.close(ours)
    assert b"\r\x1b[Kstep 1 True\r\x1b[Kstep 2 True" in said
    assert (start.run / "logs" / "s-rank-0.log").read_text() == "step 2 True\n"
