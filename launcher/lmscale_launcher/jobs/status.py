"""`lmscale status [RUN] [--watch] [--json]`: the states of runs in one table that fits the terminal."""

import json
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from lmscale.base.console import (
    LiveBlock,
    columns_of,
    escape_foreign,
    has_colour,
    is_terminal,
)
from lmscale.base.errors import ExitCode
from lmscale.base.units import show_count, show_seconds
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.jobs.answers import ClusterAnswers
from lmscale_launcher.jobs.interrupts import ends_quietly
from lmscale_launcher.jobs.run_facts import RunFolderReader, find_run_folder, run_folders
from lmscale_launcher.jobs.run_state import RunStatus, judge

_COLOURS = {
    "running": "32", "finished": "32", "pending": "33", "starting": "33", "saving": "33",
    "waiting": "33", "failed": "31", "lost": "31", "stopped": "2", "unknown": "35",
}  # fmt: skip
_NONE = "-"
_INDENT = "  "
_LEAST_NAME = 12  # of a run's name, before columns are left out
_REASON_LINES = 2  # of each run, where there are several
# The least telling come first: they are left out first where the terminal is narrow.
_DROPPED = ("RESTARTS", "NODES", "TOKENS/S", "CHECKPOINT", "LOSS", "ETA", "STEP")


def table(
    standings: Sequence[RunStatus], *, width: int, height: int | None = None, colour: bool = False
) -> list[str]:
    """Lines of at most `width` columns: a row a run, its reason below. At most `height` lines."""
    columns, rows, gap = _fitting(standings, width)
    lines = [_row({head: head for head in columns}, columns, gap, width)]
    for index, (one, row) in enumerate(zip(standings, rows, strict=True)):
        text = _row(row, columns, gap, width, paint=_COLOURS[one.state] if colour else "")
        block = [text, *_below(one, width, alone=len(standings) == 1)]
        left = len(standings) - index
        room = None if height is None else height - len(lines) - (left > 1)
        if room is not None and len(block) > room:
            lines.append(_cut(f"... and {left} more", width))
            break
        lines += block
    return lines


def _below(one: RunStatus, width: int, *, alone: bool) -> list[str]:
    texts = []
    if one.reason:
        texts.append(f"to start again: {one.reason}" if one.state == "waiting" else one.reason)
    if alone and (place := _place(one)):
        texts.append(place)
    lines = []
    for text in texts:
        wrapped = textwrap.wrap(
            _plain(text),
            max(width - len(_INDENT), 1),
            max_lines=None if alone else _REASON_LINES,
            placeholder="…",
        )
        lines += [_cut(_INDENT + line, width) for line in wrapped]
    return lines


def _place(one: RunStatus) -> str:
    """Who runs it and where."""
    job = f"{one.kind} job {one.job}" if one.kind else ""
    shown = ", ".join(one.hosts[:8]) + (f" and {len(one.hosts) - 8} more" if one.hosts[8:] else "")
    return " on ".join(part for part in (job, shown) if part)


def _fitting(
    standings: Sequence[RunStatus], width: int
) -> tuple[dict[str, int], list[dict[str, str]], str]:
    """The columns with their widths, their texts a run, and what stands between them."""
    for dropped in range(len(_DROPPED) + 1):
        shown = [head for head in _COLUMNS if head not in _DROPPED[:dropped]]
        for short, gap in ((False, "  "), (False, " "), (True, "  "), (True, " ")):
            rows = [
                {head: _plain(_COLUMNS[head](one, short)) for head in shown} for one in standings
            ]
            columns = {
                head: max([_cells(head), *(_cells(row[head]) for row in rows)]) for head in shown
            }
            rest = sum(columns.values()) - columns["RUN"] + len(gap) * (len(columns) - 1)
            if rest + min(columns["RUN"], _LEAST_NAME) <= width:
                return {**columns, "RUN": min(columns["RUN"], width - rest)}, rows, gap
    return {**columns, "RUN": max(width - columns["STATE"] - 1, 1)}, rows, gap


def _row(
    row: dict[str, str], columns: dict[str, int], gap: str, width: int, *, paint: str = ""
) -> str:
    """A line of the table; `paint` is the colour of its state."""
    cells = []
    for head, size in columns.items():
        cell = _cut(row[head], size)
        space = " " * (size - _cells(cell))
        if paint and head == "STATE":
            cells.append(f"\x1b[{paint}m{cell}\x1b[0m{space}")
        else:
            cells.append(cell + space if head in _LEFT else space + cell)
    text = gap.join(cells).rstrip()
    return text if paint else _cut(text, width)


def _steps(one: RunStatus, short: bool) -> str:
    if one.step is None and one.total_steps is None:
        return _NONE
    return "/".join(
        _NONE if number is None else _count(number, short) for number in (one.step, one.total_steps)
    )


def _count(number: int, short: bool) -> str:
    return str(number) if number < (10_000 if short else 1_000_000) else show_count(number)


def _nodes(one: RunStatus) -> str:
    if one.nodes is None:
        return _NONE
    if one.state == "pending" and one.min_nodes is not None and one.min_nodes < one.nodes:
        return f"{one.min_nodes}-{one.nodes}"
    return str(one.nodes)


def _checkpoint(one: RunStatus, short: bool) -> str:
    if one.checkpoint_step is None or one.checkpoint_age_s is None:
        return _NONE
    text = f"{_count(one.checkpoint_step, short)}, {show_seconds(one.checkpoint_age_s)}"
    return text if short else f"{text} ago"


def _known(value: float | None, show: Callable[[float], str]) -> str:
    return _NONE if value is None else show(value)


# What a column shows of a run, in full and, where the terminal is narrow, in short.
_COLUMNS: dict[str, Callable[[RunStatus, bool], str]] = {
    "RUN": lambda one, _: one.run,
    "STATE": lambda one, _: one.state,
    "NODES": lambda one, _: _nodes(one),
    "STEP": _steps,
    "LOSS": lambda one, _: _known(one.loss, lambda loss: f"{loss:.4g}"),
    "TOKENS/S": lambda one, _: _known(one.tokens_per_s, show_count),
    "ETA": lambda one, _: _known(one.eta_s, show_seconds),
    "RESTARTS": lambda one, _: str(one.restarts),
    "CHECKPOINT": _checkpoint,
}
_LEFT = ("RUN", "STATE", "CHECKPOINT")


def _plain(text: str) -> str:
    """One line that cannot move the cursor, whatever a folder or an error is named."""
    return escape_foreign(" ".join(text.split()))


def _cells(text: str) -> int:
    """Columns on a terminal: wide letters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _cut(text: str, width: int) -> str:
    """The text in at most `width` columns; where it is longer it ends with an ellipsis."""
    if _cells(text) <= width:
        return text
    while text and _cells(text) > width - 1:
        text = text[:-1]
    return text + "…" if width > 0 else ""


_LOOK_S = 2.0  # between looks into folders
_TELL_S = 30.0  # between tables where no terminal is redrawn and only numbers have moved


class StatusBoard:
    """The standings of runs, looked at again and again. Nothing is written, nothing is raised."""

    def __init__(self, folders: Callable[[], Sequence[RunFolder]], answers: ClusterAnswers) -> None:
        self._folders = folders
        self._answers = answers
        self._reader = RunFolderReader()

    def look(self) -> list[RunStatus]:
        """How all of them stand now: those that are at work first, then the newest."""
        facts = [self._reader.read(folder) for folder in self._folders()]
        now = time.time()
        standings = [
            judge(one, answer, now=now, name=_name(one.folder.path))
            for one, answer in zip(facts, self._answers.of(facts), strict=True)
        ]
        return sorted(standings, key=_order)


def status(run: str | None, *, watch: bool, as_json: bool) -> int:
    """Print the state of a run, or of all runs in runs/. Returns 0 whatever the state is.

    Raises ConfigError where RUN is not a run folder.
    """
    one = find_run_folder(run) if run is not None else None
    runs = Path("runs").absolute()
    board = StatusBoard(
        lambda: [one] if one is not None else list(run_folders(runs)), ClusterAnswers()
    )
    with ends_quietly():
        if watch:
            _watch(board, sys.stdout, as_json=as_json, alone=one is not None)
        else:
            sys.stdout.write(
                _shown(board.look(), sys.stdout, as_json=as_json, alone=one is not None)
            )
    return ExitCode.DONE


def as_object(one: RunStatus) -> dict[str, object]:
    """A standing for programs: its fields by name, and `words`, the state as a sentence."""
    return {**asdict(one), "path": str(one.path), "words": one.in_words()}


def _shown(
    standings: Sequence[RunStatus], stream: TextIO, *, as_json: bool, alone: bool,
    height: int | None = None,
) -> str:  # fmt: skip
    if as_json:
        objects = [as_object(one) for one in standings]
        return json.dumps(objects[0] if alone else objects) + "\n"
    if not standings:
        return f"no runs in {Path('runs').absolute()}; `lmscale train` and `lmscale submit` make them there\n"
    lines = table(
        standings, width=max(columns_of(stream), 20), height=height, colour=has_colour(stream)
    )
    return "\n".join(lines) + "\n"


def _watch(board: StatusBoard, stream: TextIO, *, as_json: bool, alone: bool) -> None:
    """Until Ctrl-C: in place on a terminal, else a table whenever a state or a checkpoint changes."""
    if as_json or not is_terminal(stream):
        _tell(board, stream, as_json=as_json, alone=alone)
    block = LiveBlock(stream)
    while True:
        height = max(shutil.get_terminal_size().lines - 1, 2)
        block.show(_shown(board.look(), stream, as_json=False, alone=alone, height=height))
        time.sleep(_LOOK_S)


def _tell(board: StatusBoard, stream: TextIO, *, as_json: bool, alone: bool) -> None:
    seen: object = None
    told_at, told = 0.0, ""
    while True:
        standings = board.look()
        news = [
            (one.path, one.state, one.restarts, one.checkpoint_step, one.start) for one in standings
        ]
        text = _shown(standings, stream, as_json=as_json, alone=alone)
        if news != seen or (text != told and time.monotonic() - told_at >= _TELL_S):
            seen, told, told_at = news, text, time.monotonic()
            stream.write(text)
            stream.flush()
        time.sleep(_LOOK_S)


def _name(path: Path) -> str:
    """As a user may give it to a verb: without runs/ where it stands there."""
    runs = Path("runs").absolute()
    return str(path.relative_to(runs)) if path.is_relative_to(runs) and path != runs else path.name


def _order(one: RunStatus) -> tuple[bool, float, str]:
    return not one.active, 0.0 if one.active else (one.heard_s or 0.0), one.run
