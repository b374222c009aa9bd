"""Writes that are either whole or absent after a power cut, and I/O errors in the user's words."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmscale.errors import ConfigError, LmscaleError, RetryableError

# Trying again does not help against these: the user has to change a path or a permission.
_USER_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}


def fsync_dir(path: Path) -> None:
    """Make renames and creations inside the directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Give the file this content by rename: a reader sees the old or the new one, never a part."""
    # The pid keeps two processes that replace the same file from writing into one temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an OSError into ConfigError for permissions and wrong paths, else RetryableError."""
    try:
        yield
    except OSError as error:
        raise storage_error(doing, error) from error


def storage_error(doing: str, error: OSError) -> LmscaleError:
    """The error to raise for a failed read or write; `doing` names the action and the path."""
    if error.errno in _USER_ERRORS:
        return ConfigError(f"{doing}: {error.strerror}; check the path and its permissions")
    hint = "free some space" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "check the storage"
    return RetryableError(f"{doing}: {error.strerror or error}; {hint} and start again")
