"""Checks of folders that a run writes to: file system, writing, locks, space, speed and clock."""

import errno
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.base.units import show_bytes, show_seconds
from lmscale_launcher.doctor.command_result import CommandResult, RunningCommand
from lmscale_launcher.doctor.findings import Finding, fail, ok, warn

ANSWER_S = 20.0  # a loaded file server takes seconds; longer means that it hangs
SKEW_WARN_S, SKEW_FAIL_S = 5.0, 60.0  # 60 s is how old a heartbeat may be
_SLOW_BYTES_PER_S = 50 << 20
_LLAMA_1B_BYTES = 12 * 1_236_000_000  # fp32 weights and two moments
_MOUNTS = Path("/proc/self/mountinfo")
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "cifs", "smb", "9p", "afs")
_OBJECTS = ("s3", "gcs", "goofys", "rclone", "blob", "oss")  # of fuse.*: buckets shown as folders


@dataclass(frozen=True, slots=True)
class Mount:
    """The file system that a path lies on."""

    kind: str
    options: frozenset[str]

    @property
    def shared(self) -> bool:
        """Whether other hosts may see the same files."""
        return self.kind.startswith((*_SHARED, "fuse", "virtiofs"))


def mount_of(path: Path, *, mounts: Path = _MOUNTS) -> Mount:
    """The innermost mount above a path."""
    real = Path(os.path.realpath(path))
    best, mount = -1, Mount("unknown", frozenset())
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return mount
    for line in lines:
        left, _, right = line.partition(" - ")
        target, options = left.split()[4:6]
        point = Path(target.encode().decode("unicode_escape"))  # a blank is written as \040
        if real.is_relative_to(point) and len(point.parts) >= best:
            kind, _, more = right.split(maxsplit=2)
            best = len(point.parts)
            mount = Mount(kind, frozenset(options.split(",")) | frozenset(more.split(",")))
    return mount


def start_touch(
    folder: Path, *, size: int = 4096, timeout_s: float | None = None
) -> RunningCommand:
    """Write to a folder as training does, in a process of its own."""
    argv = [
        sys.executable,
        "-P",
        "-m",
        "lmscale_launcher.doctor.storage_probe",
        str(folder),
        str(size),
    ]
    return RunningCommand(argv, timeout_s=ANSWER_S if timeout_s is None else timeout_s)


def facts_of(answer: CommandResult) -> dict[str, Any]:
    """The result of storage_probe; empty where the program failed."""
    try:
        facts = json.loads(answer.out) if answer.succeeded else {}
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def writable(what: str, folder: Path, answer: CommandResult) -> Finding:
    """Whether a file can be created and made durable in the folder."""
    facts = facts_of(answer)
    failed = facts.get("failed")
    if failed:
        return fail(
            what, f"{folder}: {failed['doing']}: {failed['words']}", _remedy(failed["errno"])
        )
    if answer.state == "hung":
        hint = (
            "the file server hangs or cannot be reached: ask its administrator, and try `ls` there"
        )
        return fail(what, f"{folder}: a write got {answer.failure}", hint)
    if not facts:
        return fail(what, f"{folder}: {answer.failure}", "check whether it can be written by hand")
    if not facts["exclusive"]:
        hint = "put run folders on a POSIX file system: attempts need exclusive creation of files"
        return fail(what, f"{folder}: a file was created exclusively twice", hint)
    return ok(what, f"{folder}: a file was written, synced, renamed and removed")


def is_missing(answer: CommandResult) -> bool:
    """Whether the folder does not exist."""
    failed = facts_of(answer).get("failed") or {}
    return failed.get("errno") in {errno.ENOENT, errno.ENOTDIR}


def _remedy(code: int) -> str:
    if code in {errno.ENOSPC, errno.EDQUOT}:
        return "free some space (or files: `df -i`, `quota -s`), or use another folder"
    if code == errno.EROFS:
        return "mounted read-only, often after an error of the disk: see `dmesg` and mount it again"
    if code in {errno.ENOENT, errno.ENOTDIR}:
        return "mount the shared file system on this host, under the same path as elsewhere"
    if code in {errno.EACCES, errno.EPERM}:
        return "check its permissions (`ls -ld`), or use another folder"
    if code == errno.ESTALE:
        return "mount it again: the file server has lost this client"
    return "check the storage"


def free_space(what: str, folder: Path, *, warn_below: int, fail_below: int = 0) -> Finding:
    """Free space for checkpoints or scratch files. Call it only after a write has succeeded."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return fail(what, f"{folder}: {error.strerror}", _remedy(error.errno or 0))
    fact = f"{folder}: {show_bytes(usage.free)} of {show_bytes(usage.total)} free"
    if usage.free < fail_below:
        return fail(what, fact, "free some space, or use another folder")
    if usage.free < warn_below:
        return warn(
            what,
            fact,
            "free some space: a checkpoint takes 12 bytes per parameter, times checkpoint.keep",
        )
    return ok(what, fact)


def clock_offset(what: str, answer: CommandResult, *, where: str) -> Finding | None:
    """The difference between this host's clock and file time stamps; None where no file was written."""
    facts = facts_of(answer)
    if "offset_s" not in facts:
        return None
    offset = -float(facts["offset_s"])
    side = "ahead of" if offset > 0 else "behind"
    hint = (
        "set this host's clock (chrony or ntpd): heartbeats older than 60 s count as dead, "
        "and their age is measured by it"
    )
    fact = f"{abs(offset):.1f} s {side} the file time stamps of {where}"
    if abs(offset) > SKEW_FAIL_S:
        return fail(what, fact, hint)
    if abs(offset) > SKEW_WARN_S:
        return warn(what, fact, hint)
    return ok(what, f"agrees with the file time stamps of {where}")


def rate(what: str, folder: Path, answer: CommandResult, *, size: int) -> Finding | None:
    """The speed of writing a checkpoint there; None where no file was written."""
    facts = facts_of(answer)
    if not facts.get("seconds") or facts.get("failed"):
        return None
    per_s = size / facts["seconds"]
    duration = show_seconds(_LLAMA_1B_BYTES / per_s)
    fact = f"{folder}: {show_bytes(per_s)}/s for {show_bytes(size)} by one process, fsync included"
    if per_s < _SLOW_BYTES_PER_S:
        hint = f"a checkpoint of llama-1b would take {duration}: save less often, or use a faster folder"
        return warn(what, fact, hint)
    return ok(what, fact, f"a checkpoint of llama-1b: {duration}")


def locks(what: str, folder: Path, answer: CommandResult, mount: Mount) -> Finding | None:
    """Whether flock excludes a second start of a run; None where no file was written."""
    facts = facts_of(answer)
    if "flock" not in facts:
        return None
    local = {"nolock", "local_lock=all", "local_lock=flock", "localflock"} & mount.options
    if facts["flock"]:
        hint = "mount it with flock (Lustre: -o flock; NFS: a lock manager), or use another folder"
        return fail(what, f"{folder}: flock: {facts['flock']}", hint)
    if local:
        hint = "start a run by hand from one host only, or mount it without this option"
        fact = f"{folder}: flock works within one host only ({', '.join(sorted(local))})"
        return warn(what, fact, hint)
    return ok(what, f"{folder}: flock excludes a second start")


def kind(what: str, folder: Path, mount: Mount, *, several_nodes: bool) -> Finding:
    """The file system of a run folder, and its consequences."""
    fact = f"{folder}: {mount.kind}"
    if mount.kind.startswith("fuse") and any(name in mount.kind for name in _OBJECTS):
        hint = "put run folders elsewhere: a bucket renames by copying, so a checkpoint can be partly visible"
        return warn(what, fact, hint)
    if mount.kind in {"tmpfs", "ramfs"}:
        return warn(
            what, f"{fact}, in memory", "put run folders on a disk: its content is lost at a reboot"
        )
    if several_nodes and not mount.shared:
        hint = "run folders of several nodes must be on a shared file system, under the same path"
        return warn(what, f"{fact}, local to this host", hint)
    if mount.kind == "overlay":
        return warn(what, f"{fact}, lost with the container", "mount a folder of the host for runs")
    if mount.kind.startswith("nfs"):
        return ok(what, fact, _nfs(mount))
    return ok(what, fact)


def _nfs(mount: Mount) -> str:
    if {"noac", "acregmax=0"} & mount.options:
        return ""
    longest = next((o.partition("=")[2] for o in mount.options if o.startswith("acregmax=")), "60")
    return (
        f"other hosts may see heartbeats and RUN/stop up to {longest} s late (attribute cache); "
        "actimeo=5 makes it 5 s"
    )
