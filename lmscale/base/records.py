"""Files of one JSON object a line that survive crashes and orphans: metrics, eval, events."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lmscale.base.errors import DataError
from lmscale.base.fs import fsync_dir

_log = logging.getLogger(__name__)


class LineFile:
    """Appends JSON objects to a file that is opened once and kept open.

    After a newer attempt has cut the file (copy and rename), this one's descriptor points to a file
    that has no name any more: what an orphan still writes, nobody sees.
    """

    def __init__(self, path: Path, *, descriptor: int | None = None) -> None:
        self.path = path
        if descriptor is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        self._descriptor = descriptor
        self._torn = _ends_torn(path)

    @classmethod
    def cut(cls, path: Path, keep: Callable[[dict[str, Any]], bool]) -> "LineFile":
        """Drop the lines that are not to be kept, and torn ones, and open the result.

        By copy and rename, durable before it returns. The new name appears with the descriptor
        already open, so no orphan's line can slip in between. A missing file becomes an empty one.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = (line for line, obj in _decoded(path) if obj is not None and keep(obj))
        return cls(path, descriptor=_rewritten(path, wanted))

    def append(self, obj: Mapping[str, Any]) -> None:
        """Write one line in one call, so writers' lines do not mix. NaN, infinity become null."""
        # JSON knows no NaN: json.dumps would write a word that jq and others refuse.
        plain = {key: _finite(value) for key, value in obj.items()}
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        data = b"\n" + line if self._torn else line
        self._torn = True  # unless the write below is whole
        while data:
            data = data[os.write(self._descriptor, data) :]
        self._torn = False

    def sync(self) -> None:
        """Make all that was appended survive a power cut. Before a checkpoint is published."""
        os.fsync(self._descriptor)

    def replaced(self) -> bool:
        """Whether the name stands for another file by now: what is appended here nobody will see."""
        own = os.fstat(self._descriptor)
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return True
        return (own.st_dev, own.st_ino) != (named.st_dev, named.st_ino)

    def touch(self) -> None:
        """Set the modification time to now, through the descriptor."""
        os.utime(self._descriptor)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines. A torn last line (a writer at work, or a crash) is left out.

    An unreadable line further up is damage: DataError. A missing file has no lines.
    """
    damaged = 0
    for number, (line, obj) in enumerate(_decoded(path), start=1):
        if damaged:
            break
        if obj is not None:
            yield obj
        elif line.endswith(b"\n"):
            damaged = number
    if damaged:
        raise DataError(
            f"{path}: line {damaged} is not a JSON object; restore the file, or let the run go on "
            "from a checkpoint, which drops unreadable lines"
        )


def readable_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that can be read, for files (events) whose gaps must not stop a run."""
    return (obj for _, obj in _decoded(path) if obj is not None)


def _decoded(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its object, None for one torn or unreadable. Empty lines are left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if line == b"\n":
                continue
            try:
                obj = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                obj = None
            yield line, obj if isinstance(obj, dict) else None


def _rewritten(path: Path, lines: Iterable[bytes]) -> int:
    """Replace the file by these lines; the descriptor returned appends to the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    flags = os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_WRONLY
    descriptor = os.open(temporary, flags, 0o644)
    try:
        with open(descriptor, "ab", closefd=False) as file:
            file.writelines(lines)
        os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)
    return descriptor


def _ends_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
