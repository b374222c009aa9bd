"""How something ended, for people.

The ranks' output, merged: each into its log file, all of it on the terminal.
"""

import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import BinaryIO

from lmscale.base.errors import ExitCode


def describe(code: int) -> str:
    """An exit code in words."""
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"died by {signal.Signals(code - 128).name}, {code}"
    with contextlib.suppress(ValueError):
        return f"{ExitCode(code).name.lower()}, {code}"
    return str(code)


_ERASE = b"\r\x1b[K"
_LONGEST_LINE = 1 << 20  # what is longer becomes several: no rank shall fill our memory
_log = logging.getLogger(__name__)


class Output:
    """Rank 0 as it is, so that its progress line works on a terminal; the others as `[rR] line`.

    With `host`, one of several nodes, every line is `[HOST:R] line`.
    """

    def __init__(self, terminal: int, *, in_place: bool, host: str = "") -> None:
        self._terminal = terminal
        self._host = host
        self._in_place = in_place  # rank 0 writes onto a terminal: pass on what is not yet a line
        self._at_line_start = True
        self._partial: dict[int, bytes] = {}
        self._files: dict[int, BinaryIO] = {}

    def open_logs(self, folder: Path, start: str, ranks: range) -> None:
        """Begin the log files of a start. Training goes on without them where they cannot be written."""
        self.close()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for rank in ranks:
                path = folder / f"{start}-rank-{rank}.log"
                self._files[rank] = open(path, "ab", buffering=0)  # noqa: SIM115 closed by close
        except OSError as error:
            self.say(f"logs are not kept: {error}")

    def feed(self, rank: int, data: bytes) -> None:
        """Bytes that a rank has written."""
        raw = rank == 0 and self._in_place
        if raw:
            self._show(data)
        *lines, rest = (self._partial.get(rank, b"") + data).split(b"\n")
        for line in lines:
            self._line(rank, line, shown=raw)
        # Of a progress line that is drawn again and again only the last state counts.
        drawn = rest.rstrip(b"\r")
        rest = rest[drawn.rfind(b"\r") + 1 :]
        if len(rest) > _LONGEST_LINE:
            self._line(rank, rest, shown=raw)
            rest = b""
        self._partial[rank] = rest

    def say(self, text: str) -> None:
        """A line of the supervisor's own."""
        prefix = f"[{self._host}] " if self._host else ""
        self._whole_lines(f"{prefix}lmscale: {text}\n".encode())

    def close(self) -> None:
        """Write what never became a line, and close the logs."""
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
            except OSError as error:  # a full disk must not end the run; its ranks decide that
                self._files.pop(rank).close()
                self.say(f"the log of rank {rank} ends here: {error}")
        if not shown:
            # lmscale's own log lines carry the rank already.
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
        # The terminal may be gone (a closed window, a pipe into head): the run goes on, the logs stay.
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._terminal, data) :]
