"""Events of a run in one file per start, and the heartbeat, which is that file's modification time."""

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

from lmscale.base.closing import Closing
from lmscale.base.fs import storage_errors
from lmscale.base.proc import started_ticks, this_host
from lmscale.base.records import LineFile, readable_lines
from lmscale.run_folder.paths import RunFolder

BEAT_S = 10.0
_log = logging.getLogger(__name__)


class Event(TypedDict):
    """One line of events/START.jsonl. Each kind has fields of its own besides these."""

    time: float  # seconds since 1970
    kind: str
    start: str
    host: NotRequired[str]  # of the writer, with its pid namespace
    pid: NotRequired[int]
    ticks: NotRequired[int | None]
    by_hand: NotRequired[bool]
    fresh: NotRequired[bool]
    nodes: NotRequired[list[str]]
    attempt: NotRequired[int]
    from_step: NotRequired[int | None]
    total_steps: NotRequired[int | None]
    step: NotRequired[int]
    code: NotRequired[int]
    reason: NotRequired[str | None]


class EventLog(Closing):
    """Appends to events/START.jsonl; node 0's supervisor and rank 0 write into the same file.

    As a context manager it also beats every 10 s from a daemon thread, which does not keep the
    process alive. Kinds in use: start, environment, attempt, save, save_failed, sample, damage,
    loss_scale, drift, stop, restart, exit; and, with the host concerned as `node` beside the writer's
    own `host`: died, stuck, lost_node, bad_node.
    """

    def __init__(self, folder: RunFolder, start: str) -> None:
        self.path = events_path(folder, start)
        self.start = start
        with storage_errors(f"writing {self.path}"):
            self._file = LineFile(self.path)
        pid = os.getpid()
        self._origin = {"host": this_host(), "pid": pid, "ticks": started_ticks(pid)}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.on_beat: Callable[[], None] = lambda: None  # called at each beat, in its thread

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event: time, kind, start, host, pid and the given fields. Visible at once."""
        event = {"time": time.time(), "kind": kind, "start": self.start, **self._origin, **fields}
        with storage_errors(f"writing {self.path}"):
            self._file.append(event)

    def beat(self) -> None:
        """Show that the run is alive: sets the file's modification time."""
        self._file.touch()

    def close(self) -> None:
        """Stop beating and close the file."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._file.close()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self.beat()
                self.on_beat()
            except OSError as error:  # a stale NFS handle, say: the next beat may succeed
                _log.warning("%s: heartbeat failed: %s", self.path, error)


def events_path(folder: RunFolder, start: str) -> Path:
    """The file of one start; characters that file names do not take are replaced."""
    return folder.events / (re.sub(r"[^\w.+-]", "_", start) + ".jsonl")


def read_events(folder: RunFolder) -> list[Event]:
    """All events of all starts, in the order of their times. Lines that are no events are left out.

    Raises UnsuitableFile for what is not a regular file.
    """
    files = sorted(folder.events.glob("*.jsonl")) if folder.events.is_dir() else []
    events = [event for file in files for event in readable_lines(file, Event)]
    return sorted(events, key=lambda event: event["time"])


def newest_start(folder: RunFolder) -> str | None:
    """The name of the start that began last, by the first event of each file."""
    files = folder.events.glob("*.jsonl") if folder.events.is_dir() else []
    firsts = [event for file in files if (event := next(readable_lines(file), None)) is not None]
    dated = [event for event in firsts if isinstance(event.get("time"), float)]
    name = max(dated, key=lambda event: event["time"], default={}).get("start")
    return name if isinstance(name, str) else None


def start_name(env: Mapping[str, str]) -> str:
    """LMSCALE_START (a scheduler's job id and restart count), else host-pid-time by hand."""
    given = env.get("LMSCALE_START")
    return given or f"{socket.gethostname()}-{os.getpid()}-{int(time.time())}"


def starts_since_progress(events: Iterable[Event]) -> int:
    """Restarts since the newest checkpoint moved: what `cluster.max_restarts` limits.

    Counted over the starts of all launchers (supervisor, scheduler, JobSet). The first start and a
    start that a person requested (by hand, or `fresh`: the first one of a submission) are not
    restarts and begin a new count. A save is progress when its step is
    beyond every one before it: a run that falls back and saves the same steps again must end too.
    """
    restarts = -1
    highest = -1
    seen: set[str] = set()
    for event in events:
        if event["kind"] == "start" and event["start"] not in seen:
            seen.add(event["start"])  # the supervisor and rank 0 may both report one start
            if event.get("by_hand") or event.get("fresh"):
                restarts, highest = 0, -1
            else:
                restarts += 1
        elif event["kind"] == "save" and event.get("step", -1) > highest:
            restarts, highest = 0, event["step"]
    return max(restarts, 0)
