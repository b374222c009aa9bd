"""Which log file shows a run: of the newest job, or of one rank of the newest start that has one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.jobs.facts import Facts, starts_of, when
from launcher.jobs.start import belongs, newest_start_of
from lmscale.run.folder import RunFolder

_RANK_LOG = re.compile(r"(.+)-rank-(\d+)\.log")
# As supervisors mark merged lines; rank 0 of a single node has no mark.
_PREFIX = re.compile(r"\[(?:r(\d+)|([^\[\]:\s]+):(\d+))\] ")


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file to show."""

    path: Path
    rank: int | None  # None: merged from all ranks
    start: str | None  # None: of all starts of a job


def log_of(facts: Facts, *, rank: int | None) -> LogFile | None:
    """The file that shows the newest of a run, whether it is there yet or not; None: no name is known.

    Without a rank: the newest job's merged log, or rank 0's where somebody has started the run by
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
