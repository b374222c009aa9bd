"""Attempts fence each other: of all that is published in a folder, one history is valid.

An attempt claims a number before it loads (`claim`), and records the step that it resumes from once the
load has succeeded (`settle`). Whatever an older, still running attempt publishes afterwards beyond
that step is invalid (`Fence.valid`), however late it arrives: no clock, lease or lock is trusted.
"""

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypedDict

from lmscale.base.decoding import Range, RecordError, decode
from lmscale.base.errors import CheckpointError, Overtaken
from lmscale.base.fs import (
    UnsuitableFile,
    atomic_write,
    create_exclusively,
    read_regular,
    storage_error,
    storage_errors,
)
from lmscale.run_folder.paths import RunFolder

_MAX_BYTES = 1 << 20
_RESTORE = (
    "the file is damaged, so it is unknown which checkpoints count: restore it, or set its "
    '"from" to the step that attempt resumed from (see its events)'
)
_Step = Annotated[int, Range(0)]
# The content of attempts/k.json; host, pid and time are for people.
AttemptFile = TypedDict(
    "AttemptFile",
    {
        "attempt": int,
        "from": _Step | None,
        "source": str | None,
        "finished": _Step | None,
        "placement": dict[str, Any],
    },
)
_NAME = re.compile(r"([1-9]\d*)\.json")


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempts/k.json."""

    number: int
    from_step: int | None = None  # None: claimed, fences nothing
    source: str | None = None  # checkpoint of another run that it resumed from
    finished: int | None = None  # the step at which it completed the run
    placement: Mapping[str, Any] = field(default_factory=dict)  # world, mesh, engine


@dataclass(frozen=True, slots=True)
class Fence:
    """The rule that decides which checkpoints count, over the attempts at the time of reading."""

    attempts: Mapping[int, AttemptRecord]

    def valid(self, step: int, attempt: int, *, ignoring: int | None = None) -> bool:
        """Whether no newer attempt resumed from an earlier step than this checkpoint's."""
        return self.fenced_by(step, attempt, ignoring=ignoring) is None

    def fenced_by(
        self, step: int, attempt: int, *, ignoring: int | None = None
    ) -> AttemptRecord | None:
        """The attempt that makes the checkpoint invalid. `ignoring` leaves one attempt out."""
        for number, newer in self.attempts.items():
            settled = number > attempt and number != ignoring and newer.from_step is not None
            if settled and step > (newer.from_step or 0):
                return newer
        return None

    def reached(self) -> int:
        """The highest step that an attempt of this run resumed from: its checkpoint existed."""
        own = (a.from_step or 0 for a in self.attempts.values() if a.source is None)
        return max(own, default=0)


def newest(folder: RunFolder) -> int:
    """The highest number claimed; 0 before the first attempt."""
    return max(_numbers(folder), default=0)


def claim(folder: RunFolder, placement: Mapping[str, Any]) -> int:
    """Take the next number: ends older attempts at their next publish, fences nothing yet.

    Rank 0 only, before it loads. Creation is exclusive, so two claimants get two numbers.
    """
    with storage_errors(f"claiming an attempt in {folder.attempts}"):
        folder.attempts.mkdir(parents=True, exist_ok=True)
        while True:
            number = newest(folder) + 1
            with suppress(FileExistsError):  # another claimant took it: try the next
                claimed = AttemptRecord(number, placement=placement)
                create_exclusively(_path(folder, number), _encode(claimed))
                return number


def settle(folder: RunFolder, k: int, from_step: int | None, *, source: str | None = None) -> None:
    """Record the step that attempt k resumes from (0: from the start); None takes the record back.

    `source` names another run's checkpoint (`train.resume: PATH`): its step is not of this folder.
    """
    if from_step is not None:
        check_not_overtaken(folder, k)
    old = read_attempt(folder, k)
    _rewrite(folder, AttemptRecord(k, from_step, source, None, old.placement))


def mark_finished(folder: RunFolder, k: int, step: int) -> None:
    """Record that attempt k completed the run at this step (its checkpoint is published)."""
    check_not_overtaken(folder, k)
    old = read_attempt(folder, k)
    _rewrite(folder, AttemptRecord(k, old.from_step, old.source, step, old.placement))


def finished_at(folder: RunFolder) -> int | None:
    """The step at which the run was completed, unless a newer attempt has resumed it since."""
    number = newest(folder)
    return read_attempt(folder, number).finished if number else None


def check_not_overtaken(folder: RunFolder, k: int) -> None:
    """Raise Overtaken when a newer attempt exists. Before every publish and every deletion."""
    number = newest(folder)
    if number > k:
        raise Overtaken(
            f"{folder.path}: attempt {number} has taken over from attempt {k}, which ends here "
            "without writing anything more; follow the newer one"
        )


def fence(folder: RunFolder) -> Fence:
    """Read all attempts once and return the rule over them."""
    return Fence(MappingProxyType({k: read_attempt(folder, k) for k in sorted(_numbers(folder))}))


def read_attempt(folder: RunFolder, k: int) -> AttemptRecord:
    """Read one attempt. A claim torn by a crash counts as one that never settled.

    That is safe: only a settled attempt fences anything, and settling is a rename of a synced file.
    """
    path = _path(folder, k)
    with storage_errors(f"reading {path}"):
        try:
            data = read_regular(path, _MAX_BYTES)
            if not data.endswith(b"}\n"):
                return AttemptRecord(k)
            raw = decode(AttemptFile, data, where=path, hint=_RESTORE)
            if raw["attempt"] != k:
                raise RecordError(f"{path}: it is the file of attempt {raw['attempt']}; {_RESTORE}")
        except (RecordError, UnsuitableFile) as error:
            raise CheckpointError(str(error)) from error
    return AttemptRecord(k, raw["from"], raw["source"], raw["finished"], raw["placement"])


def _numbers(folder: RunFolder) -> list[int]:
    try:
        names = os.listdir(folder.attempts)
    except FileNotFoundError:
        return []
    except OSError as error:
        # A folder that cannot be read must not look like one without attempts.
        raise storage_error(f"listing {folder.attempts}", error) from error
    return [int(match[1]) for match in map(_NAME.fullmatch, names) if match]


def _rewrite(folder: RunFolder, attempt: AttemptRecord) -> None:
    path = _path(folder, attempt.number)
    with storage_errors(f"writing {path}"):
        atomic_write(path, _encode(attempt))


def _encode(attempt: AttemptRecord) -> bytes:
    body = {
        "attempt": attempt.number,
        "from": attempt.from_step,
        "source": attempt.source,
        "finished": attempt.finished,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "placement": dict(attempt.placement),
    }
    return (json.dumps(body, indent=1) + "\n").encode()


def _path(folder: RunFolder, k: int) -> Path:
    return folder.attempts / f"{k}.json"
