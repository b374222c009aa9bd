"""RUN/status.json: the state of a run in one small file, written by the process that knows it.

Writer: the supervisor of node 0, or rank 0 where it has no supervisor (torchrun, accelerate, one
srun task per rank, mpirun). The file is replaced at each change of state and otherwise at most
every 10 s. It is not fsynced: after a power cut the heartbeat is old, so nothing in it counts.

Readers: `lmscale status`. The file counts only for the newest start of the run, and a state that is
not final counts only while the heartbeat of that start is fresh; otherwise the run is `lost`.

Keys: format, start, state, step, reason, since, started, time, host, pid (see StatusRecord).
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lmscale.base.decoding import Limits, convert, decode_file
from lmscale.base.errors import DataError, ExitCode, is_restartable
from lmscale.base.fs import atomic_write
from lmscale.base.proc import this_host
from lmscale.base.units import show_seconds
from lmscale.run_folder.attempts import finished_at
from lmscale.run_folder.events import BEAT_S, events_path, newest_start
from lmscale.run_folder.liveness import STALE_S
from lmscale.run_folder.paths import RunFolder

FORMAT = 1  # of status.json; a reader ignores a file with another number
SUPERVISED = "LMSCALE_SUPERVISED"  # set to 1 for ranks whose supervisor writes status.json

WrittenState = Literal[
    "starting",  # the processes exist; no step of this start is done
    "running",
    "saving",  # asked to save and stop
    "waiting",  # ended with a retryable failure, to be started again by the supervisor
    "stopped",  # on request, or at train.stop_at
    "finished",  # all steps are done
    "failed",  # ended with an error
    "lost",  # never written: derived by readers from an old heartbeat
]
_ENDED: frozenset[WrittenState] = frozenset({"stopped", "finished", "failed"})
_LIMITS = Limits(max_bytes=1 << 16)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StatusRecord:
    """The content of status.json. Times are unix seconds."""

    start: str  # name of the start (LMSCALE_START), as in its events
    state: WrittenState
    step: int | None  # optimizer steps done; None: not known yet
    reason: str  # a sentence or a phrase for people; may be empty
    since: float  # when this state with this reason began
    started: float  # when the writer of this start began
    time: float  # when the file was written
    host: str  # of the writer
    pid: int  # of the writer


class StatusWriter:
    """Writes the status of one start. Safe to call from several threads.

    A write that fails (a full disk) is logged once and does not end the run. Where the file is of a
    start that began later than this one, nothing is written.
    """

    def __init__(
        self, folder: RunFolder, start: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = folder.status
        self._clock = clock
        self._lock = threading.Lock()
        self._failed = False
        now = clock()
        host = this_host().split("/")[0]
        self._record = StatusRecord(
            start, "starting", None, "", now, now, -math.inf, host, os.getpid()
        )

    @property
    def state(self) -> WrittenState:
        """The state that was given last."""
        return self._record.state

    def update(self, state: WrittenState, *, step: int | None = None, reason: str = "") -> None:
        """Note the status; write it if state or reason changed, or if the file is 10 s old."""
        with self._lock:
            self._update(state, step, reason)

    def update_if_changed(self, state: WrittenState, *, step: int | None, reason: str) -> None:
        """`update` for the thread that trains: only at a change, and never waiting for another thread.

        A heartbeat that hangs in the file system holds the lock; the next heartbeat brings the change.
        """
        if (state, reason) == (self._record.state, self._record.reason):
            return
        if self._lock.acquire(blocking=False):
            try:
                self._update(state, step, reason)
            finally:
                self._lock.release()

    def _update(self, state: WrittenState, step: int | None, reason: str) -> None:
        now, old = self._clock(), self._record
        if old.state in _ENDED and state not in _ENDED:
            return  # a heartbeat that was waiting for the lock when the start ended
        changed = (state, reason) != (old.state, old.reason)
        record = replace(
            old,
            state=state,
            step=old.step if step is None else step,
            reason=reason,
            since=now if changed else old.since,
        )
        if changed or now - old.time >= BEAT_S:
            record = replace(record, time=now)
            self._write(record)
        self._record = record

    def _write(self, record: StatusRecord) -> None:
        newer = _read(self._path)
        if newer is not None and newer.start != record.start and newer.started > record.started:
            return
        text = json.dumps({"format": FORMAT, **asdict(record)}, indent=1, allow_nan=False) + "\n"
        try:
            atomic_write(self._path, text.encode(), durable=False)
            self._failed = False
        except OSError as error:
            if not self._failed:
                _log.warning("%s cannot be written: %s", self._path, error.strerror or error)
            self._failed = True


def state_after_exit(folder: RunFolder, code: int, *, scheduled: bool) -> tuple[WrittenState, str]:
    """The state of a run whose newest start has ended with this exit code, with a reason.

    `scheduled`: a scheduler has made this start and may make another one. Reads RUN/stop and the
    newest attempt. Raises OSError or LmscaleError where they cannot be read.
    """
    may_restart = is_restartable(code) or code == ExitCode.SAVED
    if scheduled and may_restart and not folder.stop.exists():
        return "waiting", "the scheduler may start it again"
    match code:
        case ExitCode.DONE if finished_at(folder) is not None:
            return "finished", ""
        case ExitCode.DONE:
            return "stopped", "at train.stop_at"
        case ExitCode.SAVED:
            return "stopped", "saved and stopped on request"
        case ExitCode.OVERTAKEN:
            return "stopped", "overtaken by a newer start"
    return "failed", f"exit code {code}"


def read_status(folder: RunFolder, *, now: float | None = None) -> StatusRecord | None:
    """The status of the newest start; None if its writer has not written any.

    The file of another start, or one that cannot be decoded, counts as absent. A state that is not
    final becomes `lost` once the heartbeat of the start is 60 s old.
    """
    record = _read(folder.status)
    if record is None or record.start != newest_start(folder):
        return None
    try:
        beat = events_path(folder, record.start).stat().st_mtime
    except OSError:
        beat = record.time
    return judged(record, beat_time=beat, now=time.time() if now is None else now)


def judged(record: StatusRecord, *, beat_time: float, now: float) -> StatusRecord:
    """The record as it counts now; beat_time: of the newest heartbeat of its start."""
    age_s = max(now - max(beat_time, record.time), 0.0)
    if record.state in _ENDED or age_s < STALE_S:
        return record
    before = record.state if not record.reason else f"{record.state} ({record.reason})"
    reason = f"no heartbeat for {show_seconds(age_s)} from {record.host}; before that: {before}"
    return replace(record, state="lost", reason=reason, since=now - age_s)


def _read(path: Path) -> StatusRecord | None:
    """The file's record; None if it is missing, unreadable, damaged, or of another format."""
    try:
        body = decode_file(dict[str, Any], path, limits=_LIMITS)
        record = convert(StatusRecord, body, where=path)
    except (OSError, DataError):
        return None
    return record if body.get("format") == FORMAT else None
