"""`lmscale logs RUN [-f] [--rank R] [--json]`: which log file shows a run, and following it.

The log is the merged one of the newest job, or that of one rank of the newest start that has one.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lmscale.base.errors import ConfigError, ExitCode, Problem
from lmscale.base.records import FollowedFile
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.jobs.answers import ClusterAnswers
from lmscale_launcher.jobs.interrupts import ends_quietly
from lmscale_launcher.jobs.run_facts import (
    RunFacts,
    RunFolderReader,
    belongs,
    find_run_folder,
    newest_start_of,
    starts_of,
    when,
)
from lmscale_launcher.jobs.run_state import RunStatus, judge

_RANK_LOG = re.compile(r"(.+)-rank-(\d+)\.log")
# As supervisors mark merged lines; rank 0 of a single node has no mark.
_PREFIX = re.compile(r"\[(?:r(\d+)|([^\[\]:\s]+):(\d+))\] ")


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file to show."""

    path: Path
    rank: int | None  # None: merged from all ranks
    start: str | None  # None: of all starts of a job


def log_of(facts: RunFacts, *, rank: int | None) -> LogFile | None:
    """The file that shows the newest of a run, whether it is there yet or not; None: no name is known.

    Without a rank: the newest job's merged log, or rank 0's where the run has been started by
    hand since.
    """
    record, start = facts.record, newest_start_of(facts.events)
    if rank is None and record is not None:
        by_hand = start is not None and start.time >= record.time and not belongs(start, record)
        if not by_hand:
            return LogFile(facts.folder.logs / f"job-{record.number}.log", None, None)
    found = [one for one in _rank_logs(facts.folder) if one.rank == (rank or 0)]
    if not found:
        return None
    times = {path.stem: when(first) for path, first in starts_of(facts.folder)}
    return max(found, key=lambda one: _begun(one, times))


def ranks_with_logs(folder: RunFolder) -> list[int]:
    """Ranks that have written a log in any start."""
    return sorted({one.rank for one in _rank_logs(folder) if one.rank is not None})


def as_object(line: str, log: LogFile, *, start: str | None) -> dict[str, object]:
    """A line for programs: what it says, and the rank, node and start where they are known."""
    rank, node, text = log.rank, None, line
    if log.rank is None and (match := _PREFIX.match(line)):
        rank, node, text = int(match[1] or match[3]), match[2], line[match.end() :]
    known = {"rank": rank, "node": node, "start": log.start or start}
    return {**{key: value for key, value in known.items() if value is not None}, "line": text}


def _rank_logs(folder: RunFolder) -> list[LogFile]:
    names = folder.logs.iterdir() if folder.logs.is_dir() else ()
    parsed = [
        (path, _RANK_LOG.fullmatch(path.name))
        for path in names
        if not path.name.startswith("mpi-")  # of all ranks: mpirun merges them itself
    ]
    return [LogFile(path, int(match[2]), match[1]) for path, match in parsed if match]


def _begun(log: LogFile, times: Mapping[str, float]) -> tuple[float, str]:
    """When its start began; a file without events counts by its last write."""
    time = times.get(log.start or "")
    return (log.path.stat().st_mtime if time is None else time), log.path.name


_FIRST_LINES = 20
_POLL_S = 0.2  # the log file
_LOOK_S = 1.0  # the run folder
_LATE_S = 2.0  # the last lines of a job may reach the file after the word that it has ended


def logs(run: str, *, follow: bool, rank: int | None, as_json: bool) -> int:
    """Show the newest log of a run, whole; with `follow` its end, and what comes until the run ends.

    Raises ConfigError where RUN is not a run folder, or where that rank has no log.
    """
    view = _View(find_run_folder(run), rank, as_json=as_json)
    with ends_quietly():
        if follow:
            _Follow(view).until_the_end()
        else:
            _show(view)
    return ExitCode.DONE


class _View:
    """A run folder, which of its logs is wanted, and where it is shown."""

    def __init__(self, folder: RunFolder, rank: int | None, *, as_json: bool) -> None:
        self.folder = folder
        self.rank = rank
        self.as_json = as_json
        self._reader = RunFolderReader()
        self._answers = ClusterAnswers()
        self._said = ""

    def look(self) -> RunFacts:
        """The run folder as it is now."""
        return self._reader.read(self.folder)

    def judge(self, facts: RunFacts) -> RunStatus:
        """How the run stands."""
        return judge(facts, self._answers.of([facts])[0], now=time.time())

    def show(self, lines: Iterable[bytes], log: LogFile, *, start: str | None = None) -> None:
        """Lines without their ends, to standard output."""
        for line in lines:
            if self.as_json:
                text = line.decode(errors="replace")
                line = json.dumps(as_object(text, log, start=start)).encode()  # noqa: PLW2901
            sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()

    def say(self, text: str) -> None:
        """A word to the reader, beside the log, and not twice in a row."""
        if text != self._said:
            self._said = text
            sys.stderr.write(f"{text}\n")

    def say_missing(self, standing: RunStatus) -> None:
        """Why there is nothing to show. Raises ConfigError where waiting cannot help."""
        ranks = ranks_with_logs(self.folder)
        if self.rank is not None and ranks and not standing.active:
            fact = f"rank {self.rank} has no log in {self.folder.logs}"
            known = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
            raise ConfigError([Problem("--rank", fact, f"ranks with a log: {known}")])
        which = "" if self.rank is None else f" of rank {self.rank}"
        text = f"no log{which}{'' if standing.ended else ' yet'}: {standing.in_words()}"
        if not ranks and standing.step and standing.kind is None:
            text = f"no log: another launcher started the ranks and has their output; {standing.in_words()}"
        elif not ranks and standing.step and self.rank is not None:
            text += f"; `lmscale logs {standing.run}` shows all ranks"
        self.say(text)


def _show(view: _View) -> None:
    """The whole file, to its end as it is now."""
    facts = view.look()
    log = log_of(facts, rank=view.rank)
    if log is None or not log.path.exists():
        view.say_missing(view.judge(facts))
        return
    with open(log.path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            who = "it" if log.rank is None else f"rank {log.rank}"
            view.say(f"{who} has said nothing so far: {log.path} is empty")
        if view.as_json:
            view.show((line.rstrip(b"\n") for line in file), log)
        else:
            shutil.copyfileobj(file, sys.stdout.buffer)


class _Follow:
    """The last lines of a log and all that come, across starts and jobs."""

    def __init__(self, view: _View) -> None:
        self._view = view
        self._log: LogFile | None = None
        self._growing: FollowedFile | None = None
        self._start: str | None = None  # the newest, or the one whose log is shown
        self._looked = False
        self._ends_at: float | None = None

    def until_the_end(self) -> None:
        """Returns when the run has ended and all it said is shown."""
        while True:
            standing = self._look()
            until = time.monotonic() + _LOOK_S
            while self._ends_at is None and time.monotonic() < until:
                time.sleep(_POLL_S)
                self._drain()
            if self._ends_at is not None:
                if time.monotonic() >= self._ends_at:
                    break
                time.sleep(_POLL_S)
        if self._growing is not None:
            self._drain()
            self._show(self._growing.rest())
            if not self._growing.path.exists():  # then that is said already
                return
        self._view.say(f"{standing.run}: {standing.in_words()}")

    def _look(self) -> RunStatus:
        """Look into the run folder: a next start or job, and whether there is anything to come."""
        view = self._view
        facts = view.look()
        self._drain()  # what the start before said, before a word about the next
        self._turn_to(log_of(facts, rank=view.rank))
        newest = newest_start_of(facts.events)
        shown = self._log.start if self._log is not None else None
        self._tell_start(shown or (newest.name if newest is not None else None))
        self._drain()
        standing = view.judge(facts)
        if self._growing is None or not self._growing.path.exists():
            view.say_missing(standing)
        if not standing.ended:
            self._ends_at = None
        elif self._ends_at is None:
            self._ends_at = time.monotonic() + (_LATE_S if self._looked else 0)
        self._looked = True
        return standing

    def _turn_to(self, log: LogFile | None) -> None:
        if log is None or log == self._log:
            return
        if self._growing is not None:
            self._show(self._growing.rest())
            self._growing.close()
        first = _FIRST_LINES if not self._looked else None
        self._log, self._growing = log, FollowedFile(log.path, last=first)

    def _tell_start(self, start: str | None) -> None:
        if self._looked and start is not None and start != self._start and not self._view.as_json:
            sys.stdout.buffer.write(f"-- start {start} --\n".encode())
            sys.stdout.buffer.flush()
        self._start = start

    def _drain(self) -> None:
        if self._growing is not None:
            self._show(self._growing.lines())

    def _show(self, lines: list[bytes]) -> None:
        if lines and self._log is not None:
            self._view.show(lines, self._log, start=self._start)
