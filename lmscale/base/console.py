"""What people see on a terminal or in a log file: safe text, progress, colours, tables.

On a terminal progress is drawn in place; elsewhere it becomes a line from time to time, so that a log
file does not grow by it. rich is imported only where bars or tables are drawn.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from lmscale.base.units import show_bytes, show_seconds

_ERASE = "\r\x1b[K"
_PLAIN_WIDTH = 120  # columns without a terminal, and without COLUMNS


# ---- text from outside ---------------------------------------------------------------------------


def escape_foreign(text: str, *, max_chars: int | None = None, keep_newlines: bool = False) -> str:
    """Text from outside, made safe for a terminal and for UTF-8: what does not print is escaped.

    Control characters, the escape of ANSI sequences, bidirectional and other format controls, and
    lone surrogates (a file name that is not UTF-8) become Python's escapes (\\x1b, \\u202e, \\udcff);
    letters of every script stay. A backslash stays too, so the result is for people, not for
    decoding. Texts longer than `max_chars` are cut and end in "...".
    """
    if max_chars is not None and len(text) > max_chars:
        text = text[: max(max_chars - 3, 0)] + "..."
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or (keep_newlines and char == "\n") else _escaped(char)
        for char in text
    )


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


# ---- properties of a stream ----------------------------------------------------------------------


def is_terminal(stream: object) -> bool:
    """Whether a person watches the stream on a terminal that can move its cursor."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty()) and os.environ.get("TERM") != "dumb"


def has_colour(stream: object) -> bool:
    """Whether colours may be written (https://no-color.org)."""
    return is_terminal(stream) and "NO_COLOR" not in os.environ


def columns_of(stream: object) -> int:
    """Columns that a line may take. On a terminal the last one stays free: some wrap when it is full."""
    columns = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns
    return max(columns - 1, 1) if is_terminal(stream) else columns


# ---- progress ------------------------------------------------------------------------------------


class StatusLine:
    """One line of progress: drawn in place on a terminal, given to `log` from time to time elsewhere.

    `log` is called with the text at most every `log_s` seconds (None: never, the line is only for
    terminals); on a terminal the line is redrawn at most every `terminal_s` seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        log: Callable[[str], None] | None = None,
        log_s: float = 10.0,
        terminal_s: float = 0.1,  # as often as eyes follow
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._log = log
        self._clock = clock
        self.in_place = is_terminal(stream)
        self._every_s = terminal_s if self.in_place else log_s
        self._shown_s = -math.inf if self.in_place else clock()
        self._on_screen = False

    @property
    def silent(self) -> bool:
        """Whether nothing is ever shown here."""
        return not self.in_place and self._log is None

    @property
    def width(self) -> int | None:
        """Columns of a text; None where texts are not cut."""
        return columns_of(self._stream) if self.in_place else None

    def due(self) -> bool:
        """Whether it is time for the next text; so that texts that are not shown are not made."""
        return not self.silent and self._clock() - self._shown_s >= self._every_s

    def show(self, text: str) -> None:
        """Show a text now, cut to the width of the terminal."""
        self._shown_s = self._clock()
        if self.in_place:
            self._stream.write(_ERASE + text[: self.width])
            self._stream.flush()
            self._on_screen = True
        elif self._log is not None:
            self._log(text)

    def clear(self) -> None:
        """Erase the line, so that something else can be written; the next text brings it back."""
        if self._on_screen:
            self._stream.write(_ERASE)
            self._stream.flush()
            self._on_screen = False
            self._shown_s = -math.inf

    def finish(self) -> None:
        """Leave the line as it is, with the cursor on a fresh one."""
        if self._on_screen:
            self._stream.write("\n")
            self._stream.flush()
            self._on_screen = False

    def clears_for(self, record: logging.LogRecord) -> bool:
        """A logging filter that lets every record pass and erases the line before it is written."""
        self.clear()
        return True


@contextmanager
def byte_progress(
    label: str,
    stream: TextIO,
    *,
    log: Callable[[str], None] | None = None,
    log_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int, int], None]]:
    """A function to call, often, with (bytes done, bytes in all). Erased at the end.

    Shows share, bytes, rate and remaining time; `log` and `log_s` as for StatusLine.
    """
    line = StatusLine(stream, log=log, log_s=log_s, clock=clock)
    begun_s = clock()

    def show(done: int, total: int) -> None:
        if line.due():
            line.show(_bytes_text(label, done, total, clock() - begun_s))

    try:
        yield show
    finally:
        line.clear()


def _bytes_text(label: str, done: int, total: int, elapsed_s: float) -> str:
    share = min(100, 100 * done // total) if total > 0 else 100
    text = f"{label}  {share} %  {show_bytes(done)} of {show_bytes(total)}"
    if elapsed_s <= 0 or done <= 0:
        return text
    rate = done / elapsed_s
    left = f", {show_seconds((total - done) / rate)} left" if total > done else ""
    return f"{text}, {show_bytes(rate)}/s{left}"


@contextmanager
def stage_bars(
    stream: TextIO, *, announce: Callable[[str], None]
) -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with (stage, bytes done, bytes in all): one bar per stage on a terminal.

    Elsewhere `announce` is called with one text when a stage begins.
    """
    if not is_terminal(stream):
        seen: set[str] = set()

        def tell(stage: str, _done: int, total: int) -> None:
            if stage not in seen:
                seen.add(stage)
                announce(f"{stage}: {show_bytes(total)}")

        yield tell
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<16}"), BarColumn(), DownloadColumn(True),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(file=stream)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


class LiveBlock:
    """Several lines that are redrawn in place, on a terminal; elsewhere they follow each other."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.in_place = is_terminal(stream)
        self._drawn = 0  # lines
        self._size: os.terminal_size | None = None

    def show(self, text: str) -> None:
        """Put the text, which ends in a newline, in the place of the one before."""
        size = shutil.get_terminal_size()
        back = ""
        if self.in_place and self._drawn:
            # After a change of size it is unknown on which line the old text begins.
            back = f"\x1b[{self._drawn}F\x1b[J" if size == self._size else "\x1b[H\x1b[2J"
        self._stream.write(back + text)
        self._stream.flush()
        self._drawn, self._size = text.count("\n"), size


# ---- tables --------------------------------------------------------------------------------------


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    width: int = _PLAIN_WIDTH,
    right: Sequence[str] = (),
) -> str:
    """A plain table without borders, at most `width` columns wide; `right` heads are right-aligned.

    Cells are escaped and, where they do not fit, wrapped.
    """
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for head in heads:
        drawn.add_column(Text(head), justify="right" if head in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(escape_foreign(cell)) for cell in row))
    out = StringIO()
    console = Console(file=out, width=width, color_system=None, legacy_windows=False)
    console.print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
