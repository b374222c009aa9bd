"""The output of the ranks: each in its log file, all of them merged on the terminal."""

import contextlib
import os
import signal
from pathlib import Path
from typing import BinaryIO

from lmscale.base.errors import ExitCode

_ERASE = b"\r\x1b[K"
_MAX_LINE_BYTES = (
    1 << 20
)  # longer lines are cut, so that no rank can fill the memory of the supervisor


def describe_exit(code: int) -> str:
    """An exit code for people, e.g. `died by SIGKILL, 137` or `retry, 75`."""
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"died by {signal.Signals(code - 128).name}, {code}"
    with contextlib.suppress(ValueError):
        return f"{ExitCode(code).name.lower()}, {code}"
    return str(code)


class Output:
    """Passes rank 0's output on unchanged, so that its progress line works; the others as `[rR] line`.

    With `host`, on one of several nodes, every line is `[HOST:R] line`.
    """

    def __init__(self, terminal: int, *, in_place: bool, host: str = "") -> None:
        self._terminal = terminal
        self._host = host
        self._in_place = (
            in_place  # rank 0 writes to a terminal: incomplete lines are passed on, too
        )
        self._at_line_start = True
        self._partial: dict[int, bytes] = {}
        self._files: dict[int, BinaryIO] = {}

    def open_logs(self, folder: Path, start: str, ranks: range) -> None:
        """Open the log files of a start. Where they cannot be written, training continues without them."""
        self.close()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for rank in ranks:
                path = folder / f"{start}-rank-{rank}.log"
                self._files[rank] = open(path, "ab", buffering=0)  # noqa: SIM115 closed by close
        except OSError as error:
            self.report(f"the logs of the ranks cannot be written: {error}")

    def feed(self, rank: int, data: bytes) -> None:
        """Handle bytes that a rank has written."""
        raw = rank == 0 and self._in_place
        if raw:
            self._show(data)
        *lines, rest = (self._partial.get(rank, b"") + data).split(b"\n")
        for line in lines:
            self._line(rank, line, shown=raw)
        # Of a progress line that is redrawn only the last state is kept.
        drawn = rest.rstrip(b"\r")
        rest = rest[drawn.rfind(b"\r") + 1 :]
        if len(rest) > _MAX_LINE_BYTES:
            self._line(rank, rest, shown=raw)
            rest = b""
        self._partial[rank] = rest

    def report(self, text: str) -> None:
        """Write a message of the supervisor."""
        prefix = f"[{self._host}] " if self._host else ""
        self._whole_lines(f"{prefix}lmscale: {text}\n".encode())

    def close(self) -> None:
        """Write incomplete lines and close the log files."""
        for rank, rest in self._partial.items():
            if rest:
                self._line(rank, rest, shown=rank == 0 and self._in_place)
        self._partial.clear()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _line(self, rank: int, line: bytes, *, shown: bool) -> None:
        text = line.rstrip(b"\r").rpartition(b"\r")[2].removeprefix(b"\x1b[K")
        if rank in self._files:
            try:
                self._files[rank].write(text + b"\n")
            except OSError as error:  # a full disk must not end the run here; the ranks decide that
                self._files.pop(rank).close()
                self.report(f"the log of rank {rank} ends here: {error}")
        if not shown:
            # Log lines of lmscale contain the rank already.
            text = text.removeprefix(f"[r{rank}] ".encode())
            self._whole_lines(self._prefix(rank) + text + b"\n")

    def _prefix(self, rank: int) -> bytes:
        if self._host:
            return f"[{self._host}:{rank}] ".encode()
        return f"[r{rank}] ".encode() if rank else b""

    def _whole_lines(self, data: bytes) -> None:
        if not self._at_line_start:
            self._show(_ERASE if self._in_place else b"\n")
        self._show(data)

    def _show(self, data: bytes) -> None:
        self._at_line_start = data.endswith((b"\n", _ERASE))
        # The terminal may be closed (a closed window, a pipe into head): the run continues, the logs are kept.
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._terminal, data) :]
