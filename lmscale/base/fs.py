"""Writes that are either whole or absent after a power cut, and I/O errors in the user's words.

Writing a file so that it is there whole or not at all, even after a power cut.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lmscale.base.errors import ConfigError, LmscaleError, RetryableError

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


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it appears under `path` by one rename after it is on disk.

    The scratch name is fixed, so that a killed writer's remains are overwritten by its successor:
    two writers must not publish the same path at once. What fails leaves nothing behind; the
    operating system's refusals (a full disk) become RetryableError.
    """
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        try:
            with scratch.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(path)
            _sync_folder(path.parent)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RetryableError(
            f"{path}: cannot be written: {error.strerror or error}; "
            "make room or mend the file system, then run the same command again"
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
