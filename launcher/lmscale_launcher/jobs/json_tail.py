"""The two ends of a file of one JSON object a line, however long it has grown."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

Line = dict[str, Any]


_READ_BYTES = 1 << 14


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


def newest_lines(path: Path, count: int) -> list[Line]:
    """The last `count` objects, in the file's order.

    A torn last line and unreadable ones are left out; a missing file has none.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 closed below; only the opening may fail like this
    except (FileNotFoundError, NotADirectoryError):
        return []
    with file:
        file.seek(begin_of_last(file, count))
        return objects(file.read().rpartition(b"\n")[0].split(b"\n"))


def ends_of(path: Path, *, head_bytes: int, tail_bytes: int) -> list[Line]:
    """The objects in the first and the last bytes of a file: all of them where it is short."""
    try:
        file = open(path, "rb")  # noqa: SIM115 closed below; only the opening may fail like this
    except (FileNotFoundError, NotADirectoryError):
        return []
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= head_bytes + tail_bytes:
            return objects(file.read().rpartition(b"\n")[0].split(b"\n"))
        head = file.read(head_bytes).rpartition(b"\n")[0].split(b"\n")
        file.seek(-tail_bytes, os.SEEK_END)
        tail = file.read().rpartition(b"\n")[0].split(b"\n")[1:]
    return objects([*head, *tail])


def objects(lines: list[bytes]) -> list[Line]:
    """What stands in these lines; torn and unreadable ones are left out."""
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
