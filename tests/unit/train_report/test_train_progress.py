import io
import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.train import progress_line as progress
from lmscale.train.progress_line import ProgressLine, ProgressState, progress_line

FULL = ProgressState(1234, 10_000, 2.34567, 31_200.0, 0.412, 7620.0, 1000)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """What a terminal shows: carriage return goes back, ESC[K erases."""
        lines = [""]
        for piece in self.getvalue().replace("\r\x1b[K", "\r").splitlines(keepends=True):
            if piece.endswith("\r"):
                lines[-1] = ""
            elif piece.endswith("\n"):
                lines[-1] = piece.rstrip("\n")
                lines.append("")
            else:
                lines[-1] = piece
        return lines


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_whole_line() -> None:
    assert progress_line(FULL) == (
        "step 1,234/10,000  12%  loss 2.3457  31.2K tok/s  MFU 41.2%  ETA 2h07m  saved 1,000"
    )


def test_what_is_unknown_is_left_out() -> None:
    assert progress_line(ProgressState(1, 10, 8.0)) == "step 1/10  10%  loss 8.0000"
    assert progress_line(ProgressState(1, 10, math.nan)).endswith("loss nan")


@given(st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_a_narrow_line_fits_and_keeps_the_most_telling(width: int) -> None:
    line = progress_line(FULL, width)
    assert len(line) <= width
    if width >= 11:
        assert "loss 2.3457" in line
    if width >= 60:
        assert "step 1,234/10,000" in line and "ETA" in line


def test_the_last_percent_is_not_shown_before_the_last_step() -> None:
    assert "99%" in progress_line(ProgressState(9_999, 10_000, 1.0))
    assert "100%" in progress_line(ProgressState(10_000, 10_000, 1.0))


def test_a_file_gets_whole_lines_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine(stream, 100, every_steps=30, clock=clock)
    for step in range(1, 101):
        clock.now = float(step)
        line.update(step, 3.0, 1000.0, None)
        if step == 50:
            line.saved(50)
    line.close()
    lines = stream.getvalue().splitlines()
    assert [text.split()[1] for text in lines] == ["1/100", "30/100", "60/100", "90/100", "100/100"]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert "saved" not in lines[1] and "saved 50" in lines[2]
    assert "ETA 40s" in lines[2]  # 40 steps left at one a second


def test_closing_writes_nothing_twice() -> None:
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine(stream, 1, clock=clock)
    line.update(1, 3.0)
    line.close()
    line.close()
    assert stream.getvalue().count("\n") == 1
    nothing = io.StringIO()
    ProgressLine(nothing, 1).close()
    assert nothing.getvalue() == ""


def test_the_last_line_names_a_checkpoint_saved_since() -> None:
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine(stream, 100, clock=clock)
    for step in (1, 2):
        line.update(step, 3.0)
    line.saved(2)
    line.close()
    assert stream.getvalue().splitlines()[-1].endswith("saved 2")


def test_a_terminal_gets_one_line_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream, clock = Terminal(), Clock()
    line = ProgressLine(stream, 100, clock=clock)
    for step in range(1, 101):
        clock.now = float(step)
        line.update(step, 3.0, 123_456.0, 0.4)
    line.close()
    assert len(stream.screen) == 2 and stream.screen[1] == ""
    assert stream.screen[0].startswith("step 100/100") and len(stream.screen[0]) < 60


def test_fast_steps_do_not_flood_a_terminal() -> None:
    stream, clock = Terminal(), Clock()
    line = ProgressLine(stream, 10_000, clock=clock)
    for step in range(1, 1001):
        clock.now = step / 1000
        line.update(step, 3.0)
    assert stream.getvalue().count("\r") <= 11


def test_log_lines_do_not_land_behind_the_line() -> None:
    stream, clock = Terminal(), Clock()
    line = ProgressLine(stream, 100, clock=clock)
    handler = logging.StreamHandler(stream)
    handler.addFilter(line.makes_room)
    line.update(1, 3.0)
    handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "saved a checkpoint", None, None))
    line.update(2, 3.0)
    line.close()
    assert stream.screen[0] == "saved a checkpoint"
    assert stream.screen[1].startswith("step 2/100")


def test_the_time_left_follows_a_change_of_speed() -> None:
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine(stream, 1000, every_steps=1, clock=clock)
    for step in range(1, 501):
        clock.now += 10.0 if step <= 100 else 1.0
        line.update(step, 3.0)
    assert progress._WINDOW < 400
    assert "ETA 8m20s" in stream.getvalue().splitlines()[-1]  # 500 steps at one a second
