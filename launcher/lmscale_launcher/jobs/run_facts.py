"""What a run folder contains about its run, read once: the input of `judge`, besides the cluster's answer.

Cheap for any length of run: of files that grow only the ends are read, and checkpoints are judged by
name, fence and presence of their manifest. `lmscale verify` is for proofs.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lmscale.base.decoding import Limits, convert, decode_file
from lmscale.base.errors import ConfigError, DataError, LmscaleError, Problem
from lmscale.base.fs import read_text
from lmscale.base.proc import is_alive, this_host
from lmscale.base.records import ends_of, first_line, newest_lines
from lmscale.config.run_file import load
from lmscale.run_folder import events
from lmscale.run_folder.attempts import Fence, fence
from lmscale.run_folder.checkpoints import MANIFEST
from lmscale.run_folder.paths import RunFolder, parse_checkpoint_name
from lmscale.run_folder.status_file import StatusRecord, read_status
from lmscale_launcher.clusters.job import JobRecord
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.jobs.job_plan import newest_record

Event = Mapping[str, Any]
_LINES = 50  # behind loss, tokens/s and time left
_END_LIMITS = Limits(max_bytes=1 << 16)
_HEAD_BYTES, _TAIL_BYTES = 1 << 13, 1 << 16


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """The newest checkpoint that counts."""

    step: int
    time: float


@dataclass(frozen=True, slots=True)
class JobEnd:
    """RUN/jobs/K.end: what the batch script decided when its newest start had ended."""

    code: int  # exit code of the script
    reason: str  # one sentence
    again: bool  # another start follows: requeued, or a follow-up job is queued
    time: float = 0.0  # when it was written, in seconds since 1970


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run folder as it was found. Times are seconds since 1970."""

    folder: RunFolder
    starts: tuple[Event, ...] = ()  # the first event of each start, oldest first
    events: tuple[Event, ...] = ()  # of the newest start; of very many the first and the last
    beat_time: float | None = None  # of the newest start
    alive: bool | None = None  # one of its processes, where they can be seen from here
    lines: tuple[Event, ...] = ()  # the newest of metrics.jsonl
    lines_time: float | None = None
    saved: SavedCheckpoint | None = None
    attempt: int = 0  # the newest
    finished: int | None = None  # the step at which that attempt completed the run
    stop: str | None = None  # RUN/stop: what it says
    record: JobRecord | None = None
    status: StatusRecord | None = None  # RUN/status.json of the newest start
    end: JobEnd | None = None  # None: the script is at work, or did not get to write it
    planned_steps: int | None = None  # by the run file; None where it cannot be told
    trouble: str = ""  # what could not be read


def when(event: Event) -> float:
    """The time of an event; 0 where it has none."""
    time = event.get("time")
    return float(time) if isinstance(time, int | float) else 0.0


class RunFolderReader:
    """Reads run folders, and those that have not changed since only once."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, RunFacts]] = {}

    def read(self, folder: RunFolder) -> RunFacts:
        """The facts of a folder. Whatever cannot be read becomes `trouble`: nothing is raised."""
        try:
            seen = _signature(folder)
            before = self._known.get(folder.path)
            if before is None or before[0] != seen:
                before = self._known[folder.path] = (seen, _read(folder))
            return replace(before[1], alive=_alive(before[1].events))
        except (LmscaleError, OSError) as error:
            return RunFacts(folder, trouble=str(error).replace("\n  hint: ", "; "))


def run_folders(below: Path, *, depth: int = 3) -> Iterator[RunFolder]:
    """All run folders in a folder, also in folders of folders; none inside another run folder."""
    try:
        entries = sorted(entry for entry in below.iterdir() if not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for path in entries:
        if is_run_folder(path):
            yield RunFolder(path)
        elif depth > 1 and path.is_dir() and not below.resolve().is_relative_to(path.resolve()):
            yield from run_folders(path, depth=depth - 1)


def starts_of(folder: RunFolder) -> list[tuple[Path, Event]]:
    """Each start's file and first event, oldest first. A file without a whole line is no start yet."""
    found = []
    for path in folder.events.glob("*.jsonl") if folder.events.is_dir() else ():
        first = first_line(path, events.Event, max_bytes=_TAIL_BYTES)
        if first is not None:
            found.append((path, first))
    return sorted(found, key=lambda one: when(one[1]))


def _read(folder: RunFolder) -> RunFacts:
    starts = starts_of(folder)
    newest = starts[-1][0] if starts else None
    written = (
        ends_of(newest, events.Event, head_bytes=_HEAD_BYTES, tail_bytes=_TAIL_BYTES)
        if newest is not None
        else []
    )
    rule = fence(folder)
    attempt = max(rule.attempts, default=0)
    record = newest_record(folder)
    return RunFacts(
        folder,
        starts=tuple(first for _, first in starts),
        events=tuple(written),
        beat_time=_time(newest) if newest else None,
        lines=tuple(newest_lines(folder.metrics, _LINES)),
        lines_time=_time(folder.metrics),
        saved=_saved(folder, rule),
        attempt=attempt,
        finished=rule.attempts[attempt].finished if attempt else None,
        stop=_text(folder.stop),
        record=record,
        status=read_status(folder),
        end=_job_end(folder, record) if record is not None else None,
        planned_steps=_planned_steps(folder, record, written),
    )


def _job_end(folder: RunFolder, record: JobRecord) -> JobEnd | None:
    """The decision of the newest batch script; None where there is none, or where it cannot be decoded."""
    path = folder.jobs / f"{record.number}.end"
    try:
        return convert(JobEnd, decode_file(dict[str, Any], path, limits=_END_LIMITS), where=path)
    except (OSError, DataError):
        return None


def _saved(folder: RunFolder, rule: Fence) -> SavedCheckpoint | None:
    try:
        names = os.listdir(folder.checkpoints)
    except (FileNotFoundError, NotADirectoryError):
        return None
    parsed = {name: found for name in names if (found := parse_checkpoint_name(name))}
    for name in sorted(parsed, key=lambda name: parsed[name], reverse=True):
        when = _time(folder.checkpoints / name / MANIFEST)
        if when is not None and rule.valid(*parsed[name]):
            return SavedCheckpoint(parsed[name][0], when)
    return None


def _planned_steps(
    folder: RunFolder, record: JobRecord | None, events: Sequence[Event]
) -> int | None:
    """Steps of the whole run: as its newest attempt has counted them, else by its run file."""
    told = [event for event in events if isinstance(event.get("total_steps"), int)]
    if told and (record is None or record.time <= when(told[-1])):
        return int(told[-1]["total_steps"])
    files = [folder.jobs / f"{record.number}.yaml"] if record is not None else []
    for path in (*files, folder.config):
        if path.is_file():
            return _steps_of(path)
    return None


def _steps_of(path: Path) -> int | None:
    from lmscale.checks.corpus_checks import corpus_samples
    from lmscale.config.identity import total_steps

    try:
        cfg = load(path)
        return total_steps(cfg, partial(corpus_samples, cfg))
    except (LmscaleError, OSError):  # a corpus that is gone, a file of another version: no total
        return None


def _alive(events: tuple[Event, ...]) -> bool | None:
    """Whether a process that wrote into the newest start still runs; None: not to be seen from here."""
    writers = {
        (event["host"], event["pid"]): event
        for event in events
        if "host" in event and "pid" in event
    }
    if not writers:
        return None
    if any(host != this_host() for host, _ in writers):
        return None
    return any(is_alive(pid, event.get("ticks")) for (_, pid), event in writers.items())


def _signature(folder: RunFolder) -> object:
    """Changes with everything that `_read` looks at, for a few calls of stat."""
    single = (
        folder.metrics, folder.stop, folder.status, folder.config, folder.attempts, folder.checkpoints, folder.jobs,
    )  # fmt: skip
    starts = []
    if folder.events.is_dir():
        with os.scandir(folder.events) as entries:
            for entry in entries:
                facts = entry.stat()
                starts.append((entry.name, facts.st_size, facts.st_mtime_ns))
    return (*(_time(path) for path in single), *sorted(starts))


def _time(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None


def _text(path: Path) -> str | None:
    try:
        return read_text(path).strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


@dataclass(frozen=True, slots=True)
class StartRecord:
    """What is known of a start. Its owner (a supervisor, or a lone rank 0) outlives its ranks."""

    name: str
    time: float
    host: str  # of its owner, for people
    by_hand: bool
    nodes: tuple[str, ...]  # hosts of all its nodes, where it says so
    from_step: int | None  # None: it has not loaded yet
    exit: Event | None  # written by its owner: it is over
    restart: Event | None  # written by its owner: it is over, and a next one follows
    stuck: Event | None
    rank_exit: Event | None  # how rank 0 says it ended: the more telling words
    cause: str  # what the supervisor blames: a stuck rank, a lost node; may be empty
    first_dead: str  # which rank died first; may be empty

    @property
    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        code = self.exit.get("code") if self.exit is not None else None
        return code if isinstance(code, int) else None


def newest_start_of(events: Sequence[Event]) -> StartRecord | None:
    """The start that these events of one file describe; None without any.

    A file holds several where a name was given twice: the last one counts.
    """
    own = _last_one(events)
    if not own:
        return None
    first = own[0]
    last = {(_writer(event) == _writer(first), event.get("kind")): event for event in own}
    attempt = last.get((False, "attempt")) or last.get((True, "attempt"))
    from_step = attempt.get("from_step") if attempt is not None else None
    nodes = first.get("nodes")
    return StartRecord(
        name=str(first.get("start", "")),
        time=when(first),
        host=str(first.get("host", "")).partition("/")[0],
        by_hand=bool(first.get("by_hand")),
        nodes=tuple(map(str, nodes)) if isinstance(nodes, list) else (),
        from_step=from_step if isinstance(from_step, int) else None,
        exit=last.get((True, "exit")),
        restart=last.get((True, "restart")),
        stuck=last.get((True, "stuck")) or last.get((False, "stuck")),
        rank_exit=last.get((False, "exit")),
        cause=_cause(own),
        first_dead=_first_dead(own),
    )


def belongs(start: StartRecord, record: JobRecord) -> bool:
    """Whether this start is one of this submission, by its name or, for other names, by its time."""
    if start.name.startswith(f"{record.kind}-{record.job}-"):
        return True
    return not start.by_hand and start.time >= record.time - cluster_of(record.kind).clock_skew_s


def _cause(events: Sequence[Event]) -> str:
    """What the supervisor blames: the most telling of its events, and of several alike the first."""
    first = {str(event.get("kind")): event for event in reversed(events)}
    if found := first.get("stuck"):
        return str(found.get("reason") or "")
    if found := first.get("bad_node"):
        reasons = found.get("reasons")
        told = "; ".join(map(str, reasons)) if isinstance(reasons, list) else str(reasons or "")
        return f"{found.get('node')} failed its check: {told}"
    if found := first.get("lost_node"):
        name = found.get("node") or f"node {found.get('number')}"
        return f"{name} is lost: {found.get('reason')}"
    return ""


def _first_dead(events: Sequence[Event]) -> str:
    for event in events:
        if event.get("kind") == "died":
            where = f" on {event['node']}" if event.get("node") else ""
            return f"rank {event.get('rank')}{where}"
    return ""


def _last_one(events: Sequence[Event]) -> Sequence[Event]:
    """From the last `start` that follows the end of another one in the same file."""
    begin, owner, over = 0, None, False
    for index, event in enumerate(events):
        kind = event.get("kind")
        if owner is None or (kind == "start" and over):
            begin, owner, over = index, _writer(event), False
        elif kind == "exit" and _writer(event) == owner:
            over = True
    return events[begin:]


def _writer(event: Event) -> tuple[object, object]:
    return event.get("host"), event.get("pid")


def is_run_folder(path: Path) -> bool:
    """Whether a run has been started, or submitted, in this folder."""
    folder = RunFolder(path)
    return folder.events.is_dir() or folder.config.is_file() or folder.jobs.is_dir()


def find_run_folder(run: str) -> RunFolder:
    """The run folder that a user means: its path, or its name in runs/. Raises ConfigError."""
    for path in (Path(run), Path("runs") / run):
        if is_run_folder(path):
            return RunFolder(path.absolute())
    hint = "give the folder that contains config.yaml, jobs/ and events/ (train.run_dir)"
    raise ConfigError([Problem("", f"no run folder at {run} or runs/{run}", hint)])
