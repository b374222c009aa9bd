"""Writing a file so that it is there whole or not at all, even after a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lmscale.errors import RetryableError


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
