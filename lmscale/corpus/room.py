"""A cache folder as a place: who may fill it, how much it may hold, what a killed stager has left in it."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lmscale.corpus.cache import SUFFIX
from lmscale.errors import ConfigError, Problem

_LOCK = ".staging.lock"  # not .lock, which a run's folders have
_SCRATCH = ".tmp"
_MARGIN_FRAC, _MOST_MARGIN = 0.05, 10 << 30  # of the disk, kept free for logs and checkpoints
_POLL_S = 0.2
# The user has to name another folder, or be given a permission; anything else is the disk's matter.
_USER_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


@contextmanager
def alone(cache_dir: Path, stop: threading.Event, *, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold the folder's lock; whoever else stages into it waits, and finds the work done. False: stopped.

    The kernel drops the lock when its holder dies, however it dies. Raises ConfigError for a folder that
    cannot be made or written to, OSError for a disk that has become read-only: the run goes on without it.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        failed = error.errno == errno.EROFS and (cache_dir / _LOCK).exists()
        if failed or error.errno not in _USER_ERRORS:
            raise
        fact = f"{cache_dir}: {error.strerror}"
        hint = "name a folder on the node's own disk that you may write to, or null for none"
        raise ConfigError([Problem("data.cache_dir", fact, hint)]) from error
    try:
        said = False
        while not (locked := _locked(descriptor)) and not stop.is_set():
            if not said:
                say(f"another start stages into {cache_dir}: waiting until it is done")
                said = True
            stop.wait(_POLL_S)
        yield locked
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sizes(folder: Path) -> dict[int, int]:
    """Chunk -> bytes of its copy; without those that a power cut has left empty."""
    found: dict[int, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem = entry.name.removesuffix(SUFFIX)
            if stem == entry.name or not stem.isdecimal():
                continue
            try:
                size = entry.stat().st_size
            except FileNotFoundError:  # damaged, and a reader has just removed it
                continue
            if size:
                found[int(stem)] = size
    return found


def disk_room(folder: Path) -> int:
    """Bytes that may be added to the disk of a folder, less what is kept free on it."""
    disk = os.statvfs(folder)
    margin = min(_MARGIN_FRAC * disk.f_blocks * disk.f_frsize, _MOST_MARGIN)
    return int(disk.f_bavail * disk.f_frsize - margin)


def room_left(cache_dir: Path, *, cache_bytes: int | None) -> int:
    """Bytes that may still be added: by data.cache_bytes for all corpora in the folder, and by the disk."""
    free = disk_room(cache_dir)
    if cache_bytes is None:
        return free
    return min(free, cache_bytes - _tree_bytes(cache_dir))


def sweep(folder: Path) -> None:
    """Remove what killed stagers have left. Only under the lock."""
    for path in folder.glob(f"*{_SCRATCH}"):
        path.unlink(missing_ok=True)


def put(path: Path, parts: list[memoryview]) -> None:
    """Write a file that appears under its name whole or not at all. Raises OSError, leaving nothing."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}{_SCRATCH}")
    try:
        with open(scratch, "wb", buffering=0) as file:
            for part in parts:
                done = 0
                while done < len(part):
                    done += file.write(part[done:])
        os.rename(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _tree_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total
