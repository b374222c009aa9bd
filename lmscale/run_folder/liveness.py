"""Is a start of the run alive, and may another one begin? One start at a time in a run folder."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmscale.base.errors import ConfigError, Problem
from lmscale.base.fs import lock_folder, storage_errors
from lmscale.base.proc import is_alive, this_host
from lmscale.base.records import readable_lines
from lmscale.run_folder.attempts import newest
from lmscale.run_folder.events import Event, EventLog
from lmscale.run_folder.paths import RunFolder

STALE_S = 60.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LiveRun:
    """The start that is alive in the folder."""

    start: str
    host: str  # for people: without the pid namespace
    pid: int
    attempt: int
    age_s: float  # since its last heartbeat
    here: bool  # on this host, where its pid can be seen and signalled


def live(folder: RunFolder) -> LiveRun | None:
    """The running start with the newest heartbeat, or None.

    Running: the heartbeat is younger than 60 s, no exit was written, and on this host the pid is
    alive too (there is no wait for a killed one). On another host only the heartbeat counts.
    """
    found = []
    for path in folder.events.glob("*.jsonl") if folder.events.is_dir() else []:
        age_s = time.time() - path.stat().st_mtime
        # Clocks of a file server and of its clients differ: a heartbeat from the future is young.
        if age_s < STALE_S and (one := _running(folder, path, max(age_s, 0.0))):
            found.append(one)
    return min(found, key=lambda one: one.age_s, default=None)


def _running(folder: RunFolder, path: Path, age_s: float) -> LiveRun | None:
    writers: dict[tuple[str, int], Event] = {}
    owner = None  # who opened the file: the supervisor, which outlives its ranks, or a lone rank 0
    attempt = newest(folder)
    for event in readable_lines(path, Event):
        if "host" not in event or "pid" not in event:
            continue
        writer = (event["host"], event["pid"])
        owner = owner or writer
        if event["kind"] != "exit":
            writers.setdefault(writer, event)
        elif writer == owner:
            writers.clear()
        else:
            writers.pop(writer, None)
        attempt = event.get("attempt", attempt)
    for (host, pid), event in writers.items():
        here = host == this_host()
        if not here or is_alive(pid, event.get("ticks")):
            return LiveRun(event["start"], host.split("/")[0], pid, attempt, age_s, here)
    return None


def begin_start(
    folder: RunFolder,
    start: str,
    *,
    by_hand: bool,
    ranks: int,
    nodes: Sequence[str] = (),
    fresh: bool = False,
) -> EventLog:
    """Write the start into the events of the folder; from then on it counts as alive.

    By hand only if no other start is alive: raises ConfigError naming host, pid and attempt. Look and
    write happen under one lock, so of two simultaneous starts on a host exactly one wins. Between
    hosts the attempts' fence decides. A scheduler's restart takes over at once. For the record: the
    `ranks` that this start makes, on which `nodes`, and whether it is the first of a submission
    that a person has made (`fresh`: the restart budget begins a new count).
    """
    if by_hand:
        wait_for_silence(folder)
    path = folder.events / ".lock"
    with storage_errors(f"locking {path}"):
        lock = lock_folder(
            path
        )  # without flock a warning: the fence of the attempts holds there too
    with lock:
        if by_hand:
            if (other := live(folder)) is not None:
                raise refusal(folder, other)
            with storage_errors(f"removing {folder.stop}"):
                folder.stop.unlink(missing_ok=True)
        events = EventLog(folder, start)
        events.write("start", by_hand=by_hand, ranks=ranks, nodes=list(nodes), fresh=fresh)
        return events


def refusal(folder: RunFolder, other: LiveRun) -> ConfigError:
    """The error for a start of a run that is alive."""
    attempt = f"attempt {other.attempt}" if other.attempt else "before its first attempt"
    problem = Problem(
        "train.run_dir",
        f"{folder.path} is being trained by pid {other.pid} on {other.host} ({attempt}, "
        f"last heartbeat {other.age_s:.0f} s ago)",
        f"wait for it, end it with `lmscale stop {folder.path}`, or choose another train.run_dir",
    )
    return ConfigError([problem])


def wait_for_silence(folder: RunFolder, *, poll_s: float = 1.0) -> None:
    """Raise ConfigError if another start is alive in the folder.

    A start on another host may be dead: its heartbeat shows that within 60 s.
    """
    other = live(folder)
    if other is None:
        return
    if other.here:
        raise refusal(folder, other)
    _log.warning(
        "%s was trained by pid %d on %s %.0f s ago; waiting up to %.0f s to see whether it still is",
        folder.path, other.pid, other.host, other.age_s, STALE_S - other.age_s,
    )  # fmt: skip
    heard_s = other.age_s
    while (other := live(folder)) is not None:
        if other.age_s < heard_s:
            raise refusal(folder, other)
        heard_s = other.age_s
        time.sleep(poll_s)
