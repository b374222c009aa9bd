"""`lmscale logs RUN [-f] [--rank R] [--json]`: what the ranks of a run say."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable

from launcher.jobs.answers import Answers
from launcher.jobs.facts import Facts, Reader
from launcher.jobs.find import find_run_folder
from launcher.jobs.follow import Growing
from launcher.jobs.log_files import LogFile, as_object, log_of, ranks_with_logs
from launcher.jobs.quiet import ends_quietly
from launcher.jobs.standing import Standing, judge
from launcher.jobs.start import newest_start_of
from lmscale.errors import ConfigError, ExitCode, Problem
from lmscale.run.folder import RunFolder

_FIRST_LINES = 20
_POLL_S = 0.2  # the log file
_LOOK_S = 1.0  # the run folder
_LATE_S = 2.0  # the last lines of a job may reach the file after the word that it has ended


def logs(run: str, *, follow: bool, rank: int | None, as_json: bool) -> int:
    """Show the newest log of a run, whole; with `follow` its end, and what comes until the run ends.

    Raises ConfigError where RUN is no run folder, or where that rank has no log.
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
        self._reader = Reader()
        self._answers = Answers()
        self._said = ""

    def look(self) -> Facts:
        """The run folder as it is now."""
        return self._reader.read(self.folder)

    def judge(self, facts: Facts) -> Standing:
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

    def say_missing(self, standing: Standing) -> None:
        """Why there is nothing to show. Raises ConfigError where waiting is in vain."""
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
        self._growing: Growing | None = None
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

    def _look(self) -> Standing:
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
        self._log, self._growing = log, Growing(log.path, last=first)

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
