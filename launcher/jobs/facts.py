"""What a run folder says about its run, read once: what `judge` goes by, besides the cluster's answer.

Cheap for any length of run: of files that grow only the ends are read, and checkpoints are judged by
name, fence and presence of their manifest. `lmscale verify` is for proofs.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.jobs.find import is_run_folder
from launcher.jobs.record import JobRecord, newest_record
from launcher.jobs.tail import ends_of, newest_lines, objects
from lmscale.errors import LmscaleError
from lmscale.run.attempts import Fence, fence
from lmscale.run.folder import RunFolder, parse_checkpoint_name
from lmscale.run.manifest import MANIFEST
from lmscale.run.processes import is_alive, this_host

Event = Mapping[str, Any]
_LINES = 50  # behind loss, tokens/s and time left
_HEAD_BYTES, _TAIL_BYTES = 1 << 13, 1 << 16


@dataclass(frozen=True, slots=True)
class Saved:
    """The newest checkpoint that counts."""

    step: int
    time: float


@dataclass(frozen=True, slots=True)
class Facts:
    """A run folder as it was found. Times are seconds since 1970."""

    folder: RunFolder
    starts: tuple[Event, ...] = ()  # the first event of each start, oldest first
    events: tuple[Event, ...] = ()  # of the newest start; of very many the first and the last
    beat_time: float | None = None  # of the newest start
    alive: bool | None = None  # one of its processes, where they can be seen from here
    lines: tuple[Event, ...] = ()  # the newest of metrics.jsonl
    lines_time: float | None = None
    saved: Saved | None = None
    attempt: int = 0  # the newest
    finished: int | None = None  # the step at which that attempt completed the run
    stop: str | None = None  # RUN/stop: what it says
    record: JobRecord | None = None
    planned_steps: int | None = None  # by the run file; None where it cannot be told
    trouble: str = ""  # what could not be read


def when(event: Event) -> float:
    """The time of an event; 0 where it has none."""
    time = event.get("time")
    return float(time) if isinstance(time, int | float) else 0.0


class Reader:
    """Reads run folders, and those that have not changed since only once."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, Facts]] = {}

    def read(self, folder: RunFolder) -> Facts:
        """The facts of a folder. Whatever cannot be read becomes `trouble`: nothing is raised."""
        try:
            seen = _signature(folder)
            before = self._known.get(folder.path)
            if before is None or before[0] != seen:
                before = self._known[folder.path] = (seen, _read(folder))
            return replace(before[1], alive=_alive(before[1].events))
        except (LmscaleError, OSError) as error:
            return Facts(folder, trouble=str(error).replace("\n  hint: ", "; "))


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
        with open(path, "rb") as file:
            first = objects([file.readline(_TAIL_BYTES)])
        found += [(path, event) for event in first]
    return sorted(found, key=lambda one: when(one[1]))


def _read(folder: RunFolder) -> Facts:
    starts = starts_of(folder)
    newest = starts[-1][0] if starts else None
    events = ends_of(newest, head_bytes=_HEAD_BYTES, tail_bytes=_TAIL_BYTES) if newest else []
    rule = fence(folder)
    attempt = max(rule.attempts, default=0)
    record = newest_record(folder)
    return Facts(
        folder,
        starts=tuple(first for _, first in starts),
        events=tuple(events),
        beat_time=_time(newest) if newest else None,
        lines=tuple(newest_lines(folder.metrics, _LINES)),
        lines_time=_time(folder.metrics),
        saved=_saved(folder, rule),
        attempt=attempt,
        finished=rule.attempts[attempt].finished if attempt else None,
        stop=_text(folder.stop),
        record=record,
        planned_steps=_planned_steps(folder, record, events),
    )


def _saved(folder: RunFolder, rule: Fence) -> Saved | None:
    try:
        names = os.listdir(folder.checkpoints)
    except (FileNotFoundError, NotADirectoryError):
        return None
    parsed = {name: found for name in names if (found := parse_checkpoint_name(name))}
    for name in sorted(parsed, key=lambda name: parsed[name], reverse=True):
        when = _time(folder.checkpoints / name / MANIFEST)
        if when is not None and rule.valid(*parsed[name]):
            return Saved(parsed[name][0], when)
    return None


def _planned_steps(
    folder: RunFolder, record: JobRecord | None, events: list[dict[str, Any]]
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
    from launcher.length import corpus_samples
    from lmscale.config.length import total_steps
    from lmscale.config.load import load

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
        folder.metrics, folder.stop, folder.config, folder.attempts, folder.checkpoints, folder.jobs,
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
        return path.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
