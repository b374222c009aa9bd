"""Is somebody training in this folder right now?"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.run.attempts import newest
from lmscale.run.folder import RunFolder
from lmscale.run.lines import readable_lines
from lmscale.run.processes import is_alive, this_host

STALE_S = 60.0


@dataclass(frozen=True, slots=True)
class Live:
    """The start that holds the folder."""

    start: str
    host: str  # for people: without the pid namespace
    pid: int
    attempt: int
    age_s: float  # since its last heartbeat
    here: bool  # on this host, where its pid can be seen and signalled


def live(folder: RunFolder) -> Live | None:
    """The running start with the newest heartbeat, or None.

    Running: the heartbeat is younger than 60 s, no exit was written, and on this host the pid is
    alive too (a killed one need not be waited for). On another host only time can tell.
    """
    found = []
    for path in folder.events.glob("*.jsonl") if folder.events.is_dir() else []:
        age_s = time.time() - path.stat().st_mtime
        # Clocks of a file server and of its clients differ: a heartbeat from the future is young.
        if age_s < STALE_S and (one := _running(folder, path, max(age_s, 0.0))):
            found.append(one)
    return min(found, key=lambda one: one.age_s, default=None)


def _running(folder: RunFolder, path: Path, age_s: float) -> Live | None:
    writers: dict[tuple[str, int], dict[str, Any]] = {}
    owner = None  # who opened the file: the supervisor, which outlives its ranks, or a lone rank 0
    attempt = newest(folder)
    for event in readable_lines(path):
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
            return Live(event["start"], host.split("/")[0], pid, attempt, age_s, here)
    return None
