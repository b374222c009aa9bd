"""Files of one JSON object per line: append, read, read the ends of, follow.

The files (metrics, evaluations, events, traces) survive crashes and orphaned writers: each line is one
write, a torn last line is left out, and a new attempt cuts a file by copy and rename. Lines are decoded as
base/decoding.py does, against a spec where one is given.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

from lmscale.base.closing import Closing
from lmscale.base.decoding import Limits, RecordError, convert, parse_json
from lmscale.base.errors import DataError
from lmscale.base.fs import atomic_writer, open_regular

T = TypeVar("T")

MAX_LINE_BYTES = 1 << 24
_LIMITS = Limits(max_bytes=MAX_LINE_BYTES)
_OBJECT = dict[str, Any]
_READ_BYTES = 1 << 14
_FOLLOW_READ_BYTES = 1 << 20
_ABSENT = (FileNotFoundError, NotADirectoryError)
_log = logging.getLogger(__name__)


# ---- appending -----------------------------------------------------------------------------------


class LineFile(Closing):
    """Appends JSON objects to a file that is opened once and kept open.

    After a newer attempt has cut the file (copy and rename), this one's descriptor points to a file
    that has no name any more: what an orphan still writes there is never read.
    """

    def __init__(self, path: Path, *, descriptor: int | None = None) -> None:
        self.path = path
        if descriptor is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o666)
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
        # JSON has no NaN: json.dumps would write a word that jq and others refuse.
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
        """Whether the name belongs to another file by now, so that what is appended here is lost."""
        return _is_replaced(self._descriptor, self.path)

    def touch(self) -> None:
        """Set the modification time to now, through the descriptor."""
        os.utime(self._descriptor)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _rewritten(path: Path, lines: Iterable[bytes]) -> int:
    """Replace the file by these lines; the descriptor returned appends to the new one."""
    import fcntl

    descriptor = -1
    try:
        with atomic_writer(path) as file:
            file.writelines(lines)
            descriptor = os.dup(file.fileno())
            fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return descriptor


def _ends_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_replaced(descriptor: int, path: Path) -> bool:
    own = os.fstat(descriptor)
    try:
        named = os.stat(path)
    except _ABSENT:
        return True
    return (own.st_dev, own.st_ino) != (named.st_dev, named.st_ino)


# ---- reading whole files -------------------------------------------------------------------------


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
            f"{path}: line {damaged} is not a JSON object; restore the file, or resume the run "
            "from a checkpoint, which drops unreadable lines"
        )


@overload
def readable_lines(path: Path) -> Iterator[dict[str, Any]]: ...
@overload
def readable_lines(path: Path, spec: type[T]) -> Iterator[T]: ...
def readable_lines(path: Path, spec: Any = _OBJECT) -> Iterator[Any]:
    """The lines that can be read and fit the spec, for files whose gaps must not stop a run.

    Raises UnsuitableFile for what is not a regular file, and OSError.
    """
    for _, obj in _decoded(path):
        if obj is not None and (found := _fitting(spec, obj)) is not None:
            yield found


@overload
def decode_lines(lines: Iterable[bytes]) -> list[dict[str, Any]]: ...
@overload
def decode_lines(lines: Iterable[bytes], spec: type[T]) -> list[T]: ...
def decode_lines(lines: Iterable[bytes], spec: Any = _OBJECT) -> list[Any]:
    """The objects in these lines; torn and unreadable ones, and those that do not fit, are left out."""
    objects = map(_object_of, lines)
    found = (_fitting(spec, obj) for obj in objects if obj is not None)
    return [value for value in found if value is not None]


def _fitting(spec: Any, obj: dict[str, Any]) -> Any:
    if spec == _OBJECT:
        return obj
    try:
        return convert(spec, obj, where="line")
    except RecordError:
        return None


def _object_of(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line, where="line", limits=_LIMITS)
    except RecordError:
        return None
    return value if isinstance(value, dict) else None


def _decoded(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its object, None for one torn or unreadable. Empty lines are left out."""
    try:
        file = open_regular(path)
    except _ABSENT:
        return
    with file:
        while line := file.readline(MAX_LINE_BYTES):
            if line == b"\n":
                continue
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = _skip_rest(file)
            yield line, _object_of(line) if line.endswith(b"\n") else None


def _skip_rest(file: BinaryIO) -> bytes:
    """Read to the end of a line that is too long; what ends it stands for the line."""
    while part := file.readline(_FOLLOW_READ_BYTES):
        if part.endswith(b"\n"):
            return b"?\n"
    return b""


# ---- reading the ends of files that grow ---------------------------------------------------------


def begin_of_last(file: BinaryIO, count: int) -> int:
    """Where the last `count` whole lines begin, found backwards: cost does not grow with the file."""
    begin, found = file.seek(0, os.SEEK_END), 0
    while begin > 0:
        size = min(begin, _READ_BYTES)
        begin -= size
        file.seek(begin)
        block = file.read(size)
        at = len(block)
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            found += 1
            if found > count:
                return begin + at + 1
    return 0


def newest_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` objects, in the file's order.

    A torn last line and unreadable ones are left out; a missing file has none.
    """
    try:
        file = open_regular(path)
    except _ABSENT:
        return []
    with file:
        begin = begin_of_last(file, count)
        file.seek(max(begin, file.seek(0, os.SEEK_END) - MAX_LINE_BYTES))
        return decode_lines(_whole_lines(file.read(MAX_LINE_BYTES)))


@overload
def ends_of(path: Path, *, head_bytes: int, tail_bytes: int) -> list[dict[str, Any]]: ...
@overload
def ends_of(path: Path, spec: type[T], *, head_bytes: int, tail_bytes: int) -> list[T]: ...
def ends_of(path: Path, spec: Any = _OBJECT, *, head_bytes: int, tail_bytes: int) -> list[Any]:
    """The objects in the first and the last bytes of a file: all of them where it is short."""
    try:
        file = open_regular(path)
    except _ABSENT:
        return []
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= head_bytes + tail_bytes:
            return decode_lines(_whole_lines(file.read(head_bytes + tail_bytes)), spec)
        head = _whole_lines(file.read(head_bytes))
        file.seek(-tail_bytes, os.SEEK_END)
        tail = _whole_lines(file.read(tail_bytes))[1:]
    return decode_lines([*head, *tail], spec)


def first_line(path: Path, spec: type[T], *, max_bytes: int) -> T | None:
    """The object in the first line; None where that is torn, unreadable or does not fit."""
    with open_regular(path) as file:
        line = file.read(max_bytes).partition(b"\n")[0]
    return next(iter(decode_lines([line], spec)), None)


def _whole_lines(data: bytes) -> list[bytes]:
    return data.rpartition(b"\n")[0].split(b"\n")


# ---- following -----------------------------------------------------------------------------------


class FollowedFile:
    """The whole lines that appear in a file that is appended to, through truncation and rotation.

    The file may not exist yet.
    """

    def __init__(self, path: Path, *, last: int | None = None) -> None:
        """`last`: of what is there already only so many lines; None: all of them."""
        self.path = path
        self._last = last
        self._file: BinaryIO | None = None
        self._rest = b""

    def lines(self) -> list[bytes]:
        """The lines since the last call, without their ends. What is no whole line yet is kept back."""
        found: list[bytes] = []
        if self._file is not None:
            found += self._read()
            if _is_replaced(self._file.fileno(), self.path):  # a removed one may come again
                found += [*self._read(), *self.rest()]
                self.close()
        if self._file is None and self._open():
            found += self._read()
        return found

    def rest(self) -> list[bytes]:
        """What never became a line."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []

    def close(self) -> None:
        """Close the file; a next call of `lines` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> bool:
        try:
            self._file = open_regular(self.path)
        except _ABSENT:
            return False
        if self._last is not None:
            self._file.seek(begin_of_last(self._file, self._last))
        self._last = None  # a file that takes its place is new from its first line
        return True

    def _read(self) -> list[bytes]:
        assert self._file is not None
        # A shorter file was truncated and written again.
        if os.fstat(self._file.fileno()).st_size < self._file.tell():
            self._file.seek(0)
            self._rest = b""
        found: list[bytes] = []
        while data := self._file.read(_FOLLOW_READ_BYTES):
            *whole, self._rest = (self._rest + data).split(b"\n")
            found += whole
        return found
