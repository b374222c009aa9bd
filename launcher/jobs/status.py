"""`lmscale status [RUN] [--watch] [--json]`: how runs stand, in one table."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from launcher.jobs.answers import Answers
from launcher.jobs.facts import Reader, run_folders
from launcher.jobs.find import find_run_folder
from launcher.jobs.quiet import ends_quietly
from launcher.jobs.standing import Standing, judge
from launcher.jobs.table import table
from lmscale.errors import ExitCode
from lmscale.run.folder import RunFolder

_LOOK_S = 2.0  # between looks into folders
_TELL_S = 30.0  # between tables where no terminal is redrawn and only numbers have moved
_PLAIN_WIDTH = 120  # without a terminal, and without COLUMNS


class Board:
    """The standings of runs, looked at again and again. Nothing is written, nothing is raised."""

    def __init__(self, folders: Callable[[], Sequence[RunFolder]], answers: Answers) -> None:
        self._folders = folders
        self._answers = answers
        self._reader = Reader()

    def look(self) -> list[Standing]:
        """How all of them stand now: those that are at work first, then the newest."""
        facts = [self._reader.read(folder) for folder in self._folders()]
        now = time.time()
        standings = [
            judge(one, answer, now=now, name=_name(one.folder.path))
            for one, answer in zip(facts, self._answers.of(facts), strict=True)
        ]
        return sorted(standings, key=_order)


def status(run: str | None, *, watch: bool, as_json: bool) -> int:
    """Print how a run stands, or all runs in runs/. 0 whenever that can be told.

    Raises ConfigError where RUN is no run folder.
    """
    one = find_run_folder(run) if run is not None else None
    runs = Path("runs").absolute()
    board = Board(lambda: [one] if one is not None else list(run_folders(runs)), Answers())
    with ends_quietly():
        if watch:
            _watch(board, sys.stdout, as_json=as_json, alone=one is not None)
        else:
            sys.stdout.write(
                _shown(board.look(), sys.stdout, as_json=as_json, alone=one is not None)
            )
    return ExitCode.DONE


def as_object(one: Standing) -> dict[str, object]:
    """A standing for programs: its fields by name, and `words`, the state as a sentence."""
    return {**asdict(one), "path": str(one.path), "words": one.in_words()}


def _shown(
    standings: Sequence[Standing], stream: TextIO, *, as_json: bool, alone: bool,
    height: int | None = None,
) -> str:  # fmt: skip
    if as_json:
        objects = [as_object(one) for one in standings]
        return json.dumps(objects[0] if alone else objects) + "\n"
    if not standings:
        return f"no runs in {Path('runs').absolute()}; `lmscale train` and `lmscale submit` make them there\n"
    lines = table(standings, width=_width(stream), height=height, colour=_colourful(stream))
    return "\n".join(lines) + "\n"


def _watch(board: Board, stream: TextIO, *, as_json: bool, alone: bool) -> None:
    """Until Ctrl-C: in place on a terminal, else a table whenever a state or a checkpoint changes."""
    if as_json or not stream.isatty() or os.environ.get("TERM") == "dumb":
        _tell(board, stream, as_json=as_json, alone=alone)
    drawn, size = 0, None
    while True:
        standings, now = board.look(), shutil.get_terminal_size()
        text = _shown(standings, stream, as_json=False, alone=alone, height=max(now.lines - 1, 2))
        # After a change of size nobody knows on which line the old table begins.
        back = f"\x1b[{drawn}F\x1b[J" if drawn and now == size else "\x1b[H\x1b[2J" if drawn else ""
        stream.write(back + text)
        stream.flush()
        drawn, size = text.count("\n"), now
        time.sleep(_LOOK_S)


def _tell(board: Board, stream: TextIO, *, as_json: bool, alone: bool) -> None:
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


def _order(one: Standing) -> tuple[bool, float, str]:
    return not one.active, 0.0 if one.active else (one.heard_s or 0.0), one.run


def _width(stream: TextIO) -> int:
    # The last column stays free: some terminals wrap when it is filled.
    columns = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns
    return max(columns - 1, 20) if stream.isatty() else max(columns, 20)


def _colourful(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
