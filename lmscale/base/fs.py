"""Files and folders: atomic writes, folder locks, bounded opens, and the classification of I/O errors.

Every package writes, locks and opens through this module, so that each operation has one behaviour:

    atomic_write, atomic_writer    a reader sees the old file or the new one, never a part of it
    create_exclusively             of several writers of one new name exactly one succeeds
    lock_folder                    one process at a time, with one policy for file systems without flock
    open_regular, read_regular     regular files only, and not more bytes than allowed
    storage_error, storage_errors  what an OSError means for the user: which exit code, which next action
"""

import errno
import fcntl
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from lmscale.base.errors import ConfigError, DataError, LmscaleError, RetryableError

_log = logging.getLogger(__name__)

# A retry does not help against these: the user has to change a path or a permission.
USER_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG})
FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What flock reports on file systems without locks, for example Lustre mounted without `-o flock`.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
_POLL_S = 0.05
_TEMPORARY = ".tmp"
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


# ---- errors --------------------------------------------------------------------------------------


class UnsuitableFile(DataError):
    """A path that must not be read: it is not a regular file, or it is larger than allowed."""


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn an OSError into ConfigError for permissions and wrong paths, else RetryableError."""
    try:
        yield
    except OSError as error:
        raise storage_error(action, error) from error


def storage_error(action: str, error: OSError) -> LmscaleError:
    """The error to raise for a failed read or write; `action` names the action and the path."""
    if error.errno in USER_ERRORS:
        return ConfigError(f"{action}: {error.strerror}; check the path and its permissions")
    hint = "check the storage"
    if error.errno in FULL_ERRORS:
        limit = " or raise the limit on file sizes" if error.errno == errno.EFBIG else ""
        hint = f"free some space{limit}"
    return RetryableError(f"{action}: {error.strerror or error}; {hint} and start again")


# ---- writing -------------------------------------------------------------------------------------


def fsync_dir(path: Path) -> None:
    """Make renames and creations inside the directory survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of a file that is closed already survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes, *, durable: bool = True, mode: int | None = None) -> None:
    """Give the file this content by rename, as `atomic_writer` does. Raises OSError."""
    with atomic_writer(path, durable=durable, mode=mode) as file:
        file.write(data)


@contextmanager
def atomic_writer(
    path: Path, *, durable: bool = True, mode: int | None = None, single_writer: bool = False
) -> Iterator[BinaryIO]:
    """A file to write to, which gets the name `path` by one rename when the block ends.

    `durable`: file and folder are on the disk before this returns, so a power cut leaves the old
    content or the new one. `mode`: exact permissions; None: 0666 less the umask. Any exception
    leaves the old content and removes the temporary file. Raises OSError.

    The temporary file lies beside `path`, with a random name ending in ".tmp": processes on several
    hosts may replace one file at the same time. With `single_writer` its name is fixed instead
    (".NAME.tmp"), so that a successor overwrites what a killed writer has left; the caller guarantees
    that there is one writer at a time.
    """
    token = "" if single_writer else f".{secrets.token_hex(6)}"
    temporary = path.with_name(f".{path.name}{token}{_TEMPORARY}")
    flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC
    flags |= os.O_TRUNC if single_writer else os.O_EXCL
    descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
    try:
        with open(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(descriptor, mode)  # the umask does not apply to an explicit mode
            yield file
            file.flush()
            if durable:
                os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_dir(path.parent)


def create_exclusively(
    path: Path, data: bytes, *, durable: bool = True, mode: int | None = None
) -> None:
    """Create a file that must not exist yet. Raises FileExistsError where it does, else OSError.

    Of several callers exactly one succeeds, also where flock does not exist (O_EXCL). A reader may
    see the file before all of `data` is in it. A failed write removes the file again.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666 if mode is None else mode)
    try:
        with open(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            if durable:
                os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    if durable:
        fsync_dir(path.parent)


# ---- locks ---------------------------------------------------------------------------------------


class FolderLock:
    """An exclusive lock, held until it is released. Use it as a context manager.

    The kernel releases it when the last process that has the descriptor open ends, however it ends.
    """

    def __init__(self, descriptor: int, *, acquired: bool, supported: bool) -> None:
        self.descriptor = descriptor  # a child that inherits it holds the lock too
        self.acquired = acquired  # False: `stop` was set, or `timeout_s` has passed
        self.supported = supported  # False: the file system has no locks, so nothing is guarded

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def lock_folder(
    path: Path,
    *,
    required: bool = False,
    timeout_s: float | None = None,
    stop: threading.Event | None = None,
    on_wait: Callable[[], None] | None = None,
) -> FolderLock:
    """Take the exclusive lock whose file is `path`, and wait until it is free.

    The folder and the file are made where they are missing. `on_wait` is called once, before the
    first wait. Waiting ends without the lock (`acquired` is False) after `timeout_s` seconds or when
    `stop` is set. On a file system without flock one warning is logged and the lock counts as
    acquired, unless it is `required`: then the OSError is raised. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        acquired = _wait_for(descriptor, timeout_s=timeout_s, stop=stop, on_wait=on_wait)
        return FolderLock(descriptor, acquired=acquired, supported=True)
    except OSError as error:
        if required or error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        _warn_without_locks(path, error.strerror or str(error))
        return FolderLock(descriptor, acquired=True, supported=False)
    except BaseException:
        os.close(descriptor)
        raise


def _wait_for(
    descriptor: int,
    *,
    timeout_s: float | None,
    stop: threading.Event | None,
    on_wait: Callable[[], None] | None,
) -> bool:
    until = None if timeout_s is None else time.monotonic() + timeout_s
    while not _try_lock(descriptor):
        if on_wait is not None:
            on_wait()
            on_wait = None
        if timeout_s is None and stop is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return True
        if (stop is not None and stop.is_set()) or (until is not None and time.monotonic() > until):
            return False
        if stop is not None:
            stop.wait(_POLL_S)
        else:
            time.sleep(_POLL_S)
    return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@cache
def _warn_without_locks(path: Path, reason: str) -> None:
    _log.warning(
        "%s: file locking is not supported here (%s); do not start the same command twice at once",
        path, reason,
    )  # fmt: skip


# ---- opening -------------------------------------------------------------------------------------


def open_regular(path: Path, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file for reading; never blocks on what is not one.

    Raises UnsuitableFile for a FIFO, folder, device or socket, and for a file of more than
    `max_bytes` bytes. Raises OSError as `open` does, FileNotFoundError among them.
    """
    return open(open_descriptor(path, max_bytes), "rb")


def open_descriptor(path: Path, max_bytes: int | None = None) -> int:
    """As `open_regular`; the descriptor alone, for positioned reads."""
    try:
        # A FIFO without a writer would block the open call without O_NONBLOCK.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # A socket gives ENXIO. So does a device that has just disappeared, which proves nothing about the data.
        if error.errno == errno.ENXIO and stat.S_ISSOCK(os.stat(path).st_mode):
            raise UnsuitableFile(_refusal(path, "a socket")) from error
        raise
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "a special file")
            raise UnsuitableFile(_refusal(path, kind))
        if max_bytes is not None and facts.st_size > max_bytes:
            raise UnsuitableFile(_too_large(path, facts.st_size, max_bytes))
    except BaseException:
        os.close(descriptor)
        raise
    os.set_blocking(descriptor, True)
    return descriptor


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises UnsuitableFile and OSError as `open_regular` does.

    The limit holds also for files that grow meanwhile, or whose size is not known (/proc).
    """
    with open_regular(path, max_bytes) as file:
        parts, left = [], max_bytes + 1
        while left and (part := file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise UnsuitableFile(_too_large(path, max_bytes + 1, max_bytes))
    return b"".join(parts)


def read_text(path: Path, max_bytes: int = 1 << 20) -> str:
    """The text of a small file that people or other hosts write; bytes that are not UTF-8 become U+FFFD.

    Raises UnsuitableFile and OSError as `open_regular` does.
    """
    return read_regular(path, max_bytes).decode("utf-8", "replace")


def _refusal(path: Path, kind: str) -> str:
    return f"{path} is {kind}, not a regular file; remove it, or name another path"


def _too_large(path: Path, size: int, max_bytes: int) -> str:
    return (
        f"{path} has {size} bytes or more, at most {max_bytes} are allowed for such a file; "
        "restore it from a copy, or name another path"
    )
