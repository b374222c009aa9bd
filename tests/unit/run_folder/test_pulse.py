"""What a rank tells its supervisor through memory that both hold, and what the supervisor concludes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmscale.run_folder import rank_progress as pulse_module
from lmscale.run_folder.rank_progress import (
    PULSE_FD,
    STACK_FD,
    ProgressReading,
    RankProgress,
    new_descriptors,
    read_beat,
    read_stack,
)
from lmscale_launcher.supervisor.messages import decode_message
from lmscale_launcher.supervisor.stall import (
    SLOW_S,
    STOPPED_S,
    StallLimits,
    StepPace,
    Suspect,
    find_stall,
    least_progress,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pulse_module.time, "monotonic", lambda: now[0])
    return now


def test_a_tick_is_seen_by_whoever_holds_the_memory(clock: list[float]) -> None:
    fds = new_descriptors()
    try:
        assert read_beat(fds[PULSE_FD]) == ProgressReading()
        pulse = RankProgress(fds[PULSE_FD])
        pulse.tick("start")
        pulse.tick("data", 7)
        assert read_beat(fds[PULSE_FD]) == ProgressReading(2, 7, "data")
        pulse.tick("step")
        clock[0] += 90  # the first step compiles
        pulse.tick("data", 8)
        assert read_beat(fds[PULSE_FD]) == ProgressReading(4, 8, "data", warm=True)
        for phase, step, seconds in [("step", None, 0.25), ("data", 9, 2.0), ("step", None, 0.5)]:
            pulse.tick(phase, step)  # type: ignore[arg-type]
            clock[0] += seconds
        pulse.tick("save")
        clock[0] += 300  # a save is no step
        pulse.tick("data", 10)
        assert read_beat(fds[PULSE_FD]) == ProgressReading(9, 10, "data", warm=True, longest_s=2.0)
    finally:
        for fd in fds.values():
            os.close(fd)
    RankProgress().tick("step", 3)  # without a supervisor


CHILD = """
import os, sys, time
from lmscale.run_folder.rank_progress import RankProgress
def deep_inside():
    pulse.tick("data", 5)
    print("ready", flush=True)
    time.sleep(60)
pulse = RankProgress.inherited(os.environ)
deep_inside()
"""


def test_a_rank_inherits_the_memory_and_shows_its_stack_even_when_it_was_stopped() -> None:
    fds = new_descriptors()
    env = {**os.environ, **{name: str(fd) for name, fd in fds.items()}}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], env=env, pass_fds=list(fds.values()), stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        assert read_beat(fds[PULSE_FD]).phase == "data"
        for number in (signal.SIGSTOP, signal.SIGQUIT, signal.SIGCONT):
            child.send_signal(number)
        for _ in range(1000):
            if "deep_inside" in read_stack(fds[STACK_FD]):
                break
            assert child.poll() is None
            time.sleep(0.01)
        assert "in deep_inside" in read_stack(fds[STACK_FD])
    finally:
        child.kill()
        child.communicate()
        for fd in fds.values():
            os.close(fd)
    assert not list(Path("/dev/shm").glob(f"*{child.pid}*"))


def test_a_number_that_now_means_another_file_is_left_alone(tmp_path: Path) -> None:
    """A child of a rank inherits the variable but not the descriptor."""
    precious = tmp_path / "precious"
    with open(precious, "wb", buffering=0) as file:
        pulse = RankProgress.inherited({PULSE_FD: str(file.fileno()), STACK_FD: "999"})
        pulse.tick("step", 1)
    assert precious.read_bytes() == b""
    RankProgress.inherited({PULSE_FD: "x"}).tick("step", 1)


AT_WORK = ProgressReading(10, 5, "step", warm=True, longest_s=0.1)


@pytest.mark.parametrize(
    ("patience", "beat", "limit"),
    [
        (StallLimits(), AT_WORK, 30.0),
        (StallLimits(), ProgressReading(10, 5, "data", warm=True, longest_s=2.0), 100.0),
        (StallLimits(min_s=600), AT_WORK, 600.0),
        (StallLimits(), ProgressReading(10, 5, "step", warm=True, longest_s=60.0), SLOW_S),
        (
            StallLimits(),
            ProgressReading(10, 5, "step", warm=True, longest_s=3600.0),
            7200.0,
        ),  # was suspended
        (StallLimits(10.0), AT_WORK, 10.0),
        (StallLimits(10.0), ProgressReading(3, 1, "step"), SLOW_S),  # a first step
        (StallLimits(), ProgressReading(9, 5, "save", warm=True), SLOW_S),
        (StallLimits(), ProgressReading(9, 5, "eval", warm=True), SLOW_S),
        (StallLimits(), ProgressReading(), SLOW_S),  # still importing torch
        (StallLimits(7200.0), ProgressReading(9, 5, "load"), 7200.0),
    ],
)
def test_patience_is_long_where_a_step_says_nothing(
    patience: StallLimits, beat: ProgressReading, limit: float
) -> None:
    assert patience.limit_s(beat) == limit


def pace(quiet_s: float, rank: int, state: str = "S", *, step: int = 5, phase: str = "step",
         limit_s: float = 30.0, alike: int = 1) -> StepPace:  # fmt: skip
    return StepPace(quiet_s, limit_s, Suspect(rank, step, phase, state, alike))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("paces", "rank"),
    [
        ([], None),
        ([pace(29, 0)], None),
        ([pace(31, 0)], 0),
        ([pace(31, 0), pace(3, 4)], None),  # somebody moves
        ([pace(31, 0), pace(40, 4, phase="data")], 4),  # it never came to the step
        ([pace(31, 0, step=4), pace(40, 4, phase="data")], 0),
        ([pace(31, 0), pace(31, 4, limit_s=600)], None),  # one of them saves, the rest waits for it
        ([pace(STOPPED_S + 1, 0, phase="data"), pace(STOPPED_S + 1, 5, "T")], 5),
        ([pace(STOPPED_S - 1, 0), pace(STOPPED_S + 1, 5, "T")], None),
        ([pace(STOPPED_S + 1, 0), pace(STOPPED_S + 1, 5, "D")], None),  # a disk may answer yet
        ([pace(31, 0), pace(31, 5, "D")], 5),
        ([pace(STOPPED_S + 1, 5, "T", phase="save", limit_s=SLOW_S)], 5),
    ],
)
def test_the_job_is_stuck_when_nobody_moves_and_the_least_far_is_to_blame(
    paces: list[StepPace], rank: int | None
) -> None:
    found = find_stall(paces)
    assert (found and found[0].rank) == rank


def test_a_suspect_in_words_and_over_the_wire() -> None:
    worst = least_progress(
        [Suspect(3, 12, "data", "S"), Suspect(2, 12, "data", "S"), Suspect(1, 12, "step", "S")]
    )
    assert worst == Suspect(2, 12, "data", "S", 2)
    assert worst.in_words(node="n1", seconds=31.2) == (
        "rank 2 on n1 is stuck in data of step 12: no rank has made progress for 31 s; 2 ranks are in this phase"
    )
    stopped = Suspect(0, 1, "step", "T").in_words(node="", seconds=15)
    assert "rank 0 is stuck in step of step 1 (process state T: stopped)" in stopped
    here = StepPace(1.5, 30.0, worst)
    assert decode_message(json.dumps({"kind": "beat", "pace": here.as_json()}).encode()) == {
        "kind": "beat",
        "pace": here,
    }
