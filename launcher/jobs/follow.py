"""A file that somebody else appends to, read as it grows, through truncation and rotation."""

import os
from pathlib import Path
from typing import BinaryIO

from launcher.jobs.tail import begin_of_last

_READ_BYTES = 1 << 20


class Growing:
    """The whole lines that appear in a file. It may not be there yet."""

    def __init__(self, path: Path, *, last: int | None = None) -> None:
        """`last`: of what is there already only so many lines; None: all of them."""
        self.path = path
        self._last = last
        self._file: BinaryIO | None = None
        self._rest = b""

    def lines(self) -> list[bytes]:
        """The lines since the last call, without their ends. What is no line yet is kept back."""
        found: list[bytes] = []
        if self._file is not None:
            found += self._read()
            if self._replaced():
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
        """Close the file; a next call of `lines` opens it anew."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> bool:
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 read for as long as it grows
        except (FileNotFoundError, NotADirectoryError):
            return False
        if self._last is not None:
            self._file.seek(begin_of_last(self._file, self._last))
        self._last = None  # a file that takes its place is new from its first line
        return True

    def _read(self) -> list[bytes]:
        assert self._file is not None
        if os.fstat(self._file.fileno()).st_size < self._file.tell():  # truncated: written anew
            self._file.seek(0)
            self._rest = b""
        found: list[bytes] = []
        while data := self._file.read(_READ_BYTES):
            *whole, self._rest = (self._rest + data).split(b"\n")
            found += whole
        return found

    def _replaced(self) -> bool:
        """Whether the name stands for another file by now. A removed one may come again."""
        assert self._file is not None
        own = os.fstat(self._file.fileno())
        try:
            named = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return (own.st_dev, own.st_ino) != (named.st_dev, named.st_ino)
