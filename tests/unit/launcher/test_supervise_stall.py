"""A rank that hangs: it is named with its stack, killed, and the run starts again. Never a rank that works."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.stand_ins import ROOT, Nodes, Start, alive, kind, watched

TICKING = f"""
sys.path.insert(0, {str(ROOT)!r})
from lmscale.run_folder.rank_progress import RankProgress
pulse = RankProgress.inherited(os.environ)
def steps(count, seconds=0.05):
    for step in range(1, count + 1):
        pulse.tick("data", step)
        pulse.tick("step")
        time.sleep(seconds)
    pulse.tick("data", count + 1)
first = os.environ["LMSCALE_START"] in ("s", "job-1")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    yield from watched(tmp_path)


def the_stuck(start: Start) -> dict[str, Any]:
    (found,) = kind(start, "stuck")
    return found


def test_a_rank_that_hangs_is_named_with_its_stack_and_all_start_again(start: Start) -> None:
    body = TICKING + (
        "def lost_in_the_woods():\n    wait()\n"
        "steps(3)\n"
        "if first:\n"
        "    lost_in_the_woods() if rank == 1 else (pulse.tick('step'), wait())\n"
    )
    code, said = start.to_the_end(body, max_restarts=1, stall_limits=[1.0])
    assert code == 0, said
    assert "rank 1 is stuck in data of step 4: no rank has made progress for " in said
    assert "in lost_in_the_woods" in said
    found = the_stuck(start)
    assert (found["rank"], found["step"], found["phase"]) == (1, 4, "data")
    assert "lost_in_the_woods" in found["stack"] and 1 <= found["seconds"] < 10
    assert start.kinds() == ["start", "stuck", "restart", "start", "exit"]
    restart = next(event for event in start.events() if event["kind"] == "restart")
    assert restart["code"] == 137 and restart["codes"]["1"] == 137
    assert not kind(start, "died")  # it was we who killed it


def test_a_stopped_rank_on_another_node_is_named(start: Start) -> None:
    body = TICKING + "steps(3)\nmark('pid', os.getpid())\nif first: wait()\n"
    nodes = Nodes(start, body, max_restarts=1, stall_limits=[3.0]).launch()
    pids = start.wait_for("pid", 4)
    os.kill(int(pids[3]), signal.SIGSTOP)
    codes, said = nodes.end(timeout=30)
    assert codes == [0, 0], said
    assert "rank 3 on n1 (node 1) is stuck in data of step 4 (process state T: stopped)" in said[0]
    found = the_stuck(start)
    assert (found["rank"], found["node"], found["number"]) == (3, "n1", 1)
    assert "in wait" in found["stack"]
    assert start.kinds() == ["start", "stuck", "restart", "start", "exit"]
    assert not alive([int(pid) for pid in pids.values()])


@pytest.mark.parametrize(
    "work",
    [
        "wait(2)",  # still importing: it has not said a word
        "steps(1, 2.0)",  # a long first step
        "steps(3); pulse.tick('save'); wait(2)",
        "steps(3); pulse.tick('eval'); wait(2)",
        "steps(3, 0.7)",  # slow, but it moves
        "steps(3) if rank else steps(30, 0.1)",  # one of them moves: the other waits for it
    ],
)
def test_who_works_is_left_alone(start: Start, work: str) -> None:
    code, said = start.to_the_end(TICKING + work, stall_limits=[1.0])
    assert code == 0, said
    assert start.kinds() == ["start", "exit"]


def test_a_suspended_supervisor_blames_nobody(start: Start) -> None:
    """Slurm suspends a job, a laptop sleeps: all of it stops, and no time has passed for anybody."""
    body = TICKING + "steps(3); mark('pid', os.getpid())\nsteps(20, 0.1)"
    process = start.launch(body, stall_limits=[1.5])
    pids = [process.pid, *(int(pid) for pid in start.wait_for("pid", 2).values())]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(3.0 if number == signal.SIGSTOP else 0)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert start.kinds() == ["start", "exit"]
