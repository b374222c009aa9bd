"""Safe text, progress in place and in a log, tables."""

import io
import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.base import console
from lmscale.base.console import (
    LiveBlock,
    StatusLine,
    byte_progress,
    columns_of,
    escape_foreign,
    has_colour,
    is_terminal,
    stage_bars,
    table,
)

any_text = st.text(st.characters())  # lone surrogates too


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((40, 10)))


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(any_text)
def test_escaped_text_prints_and_encodes(text: str) -> None:
    safe = escape_foreign(text)
    assert safe.isprintable()
    safe.encode("utf-8")
    assert escape_foreign(safe) == safe
    kept = escape_foreign(text, keep_newlines=True)
    assert kept.replace("\n", "").isprintable()
    assert kept.count("\n") == text.count("\n")


@given(any_text.filter(str.isprintable))
def test_letters_of_every_script_stay(text: str) -> None:
    assert escape_foreign(text) == text


@given(any_text, st.integers(3, 50))
def test_long_texts_are_cut(text: str, most: int) -> None:
    assert len(escape_foreign(text, max_chars=most)) <= most * len("\\U00010ffff")
    if len(text) <= most:
        assert escape_foreign(text, max_chars=most) == escape_foreign(text)


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    assert escape_foreign("a\x1b[2Jb\r\nc\x07") == "a\\x1b[2Jb\\r\\nc\\x07"
    assert escape_foreign("\u202eevil\u2066\u200f") == "\\u202eevil\\u2066\\u200f"
    assert escape_foreign(os.fsdecode(b"\xff\x9b31m")) == "\\udcff\\udc9b31m"
    assert escape_foreign("\x9b31m\u2028") == "\\x9b31m\\u2028"
    assert escape_foreign("模型 größe Ω 🙂") == "模型 größe Ω 🙂"


def test_a_dumb_terminal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_terminal(Terminal())
    assert has_colour(Terminal())
    assert not is_terminal(io.StringIO())
    assert not is_terminal(object())
    assert columns_of(Terminal()) == 39
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())


def test_a_line_in_place_is_redrawn_cut_and_erased() -> None:
    stream, clock = Terminal(), Clock()
    line = StatusLine(stream, clock=clock, terminal_s=0.5)
    assert line.due()
    line.show("x" * 100)
    assert stream.getvalue() == "\r\x1b[K" + "x" * 39
    assert not line.due()
    clock.now += 0.5
    assert line.due()
    assert line.clears_for(logging.makeLogRecord({}))
    assert line.due()  # the next text brings it back at once
    line.clear()
    line.finish()
    assert stream.getvalue().endswith("\r\x1b[K")
    line.show("last")
    line.finish()
    assert stream.getvalue().endswith("last\n")


def test_a_log_gets_a_line_now_and_then_and_a_pipe_without_log_none() -> None:
    clock, lines = Clock(), list[str]()
    with byte_progress("read", io.StringIO(), log=lines.append, log_s=10, clock=clock) as show:
        for _ in range(25):
            clock.now += 1
            show(50, 200)
    assert lines == ["read  25 %  50 B of 200 B, 5 B/s, 30s left",
                     "read  25 %  50 B of 200 B, 2 B/s, 1m00s left"]  # fmt: skip
    stream = io.StringIO()
    with byte_progress("read", stream, clock=clock) as show:
        clock.now += 100
        show(1, 2)
    assert stream.getvalue() == ""


def test_bytes_in_place() -> None:
    stream, clock = Terminal(), Clock()
    with byte_progress("read", stream, clock=clock) as show:
        show(0, 0)
        clock.now += 1
        show(1 << 20, 1 << 20)
    assert stream.getvalue().split("\r\x1b[K")[1:] == [
        "read  100 %  0 B of 0 B", "read  100 %  1 MiB of 1 MiB, 1 MiB/s", "",
    ]  # fmt: skip


def test_bars_on_a_terminal_and_a_line_per_stage_elsewhere() -> None:
    lines = list[str]()
    with stage_bars(io.StringIO(), announce=lines.append) as show:
        for done in (0, 5, 10):
            show("tokenize", done, 10)
        show("write", 0, 2048)
    assert lines == ["tokenize: 10 B", "write: 2 KiB"]
    stream = Terminal()
    with stage_bars(stream, announce=lines.append) as show:
        show("tokenize", 10, 10)
    assert "tokenize" in stream.getvalue()
    assert len(lines) == 2


def test_a_block_is_redrawn_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    block = LiveBlock(stream)
    block.show("a\nb\n")
    block.show("c\n")
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((50, 10)))
    block.show("d\n")
    assert stream.getvalue() == "a\nb\n\x1b[2F\x1b[Jc\n\x1b[H\x1b[2Jd\n"
    plain = io.StringIO()
    block = LiveBlock(plain)
    block.show("a\n")
    block.show("b\n")
    assert plain.getvalue() == "a\nb\n"


def test_a_table_fits_and_is_safe() -> None:
    text = table(
        ["NAME", "STEP"], [["run\x1b[2J", "5"], ["b" * 60, "10"]], width=30, right=["STEP"]
    )
    assert all(len(line) <= 30 for line in text.splitlines())
    assert text.isascii()
    assert "\x1b" not in text
    assert text.splitlines()[0].split() == ["NAME", "STEP"]


def test_rich_is_imported_only_where_it_draws() -> None:
    import subprocess
    import sys

    code = f"import sys, {console.__name__}; assert not [m for m in sys.modules if m.startswith('rich')]"
    subprocess.run([sys.executable, "-c", code], check=True)
