"""Kills what ranks have started when the supervisor itself is killed.

PR_SET_PDEATHSIG ends the ranks, but their own children do not inherit it. This process, in a session of
its own, waits on a pipe that only the supervisor holds; when it closes, the ranks' process groups
are killed. Run as a script without site-packages: it starts in a few milliseconds.
"""

import contextlib
import os
import signal
import subprocess
import sys
from typing import BinaryIO, Self


class Guard:
    """The supervisor's side: which process groups must not outlive it."""

    def __init__(self) -> None:
        argv = [sys.executable, "-I", "-S", os.path.abspath(__file__)]
        # Slurm sends its signals to every process of a step. What is blocked now stays so in the new process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def pid(self) -> int:
        """The guarding process."""
        return self._process.pid

    def add(self, group: int) -> None:
        """Watch over a process group."""
        self._tell(f"+{group}\n")

    def remove(self, group: int) -> None:
        """The group is gone; its number may be used again by others."""
        self._tell(f"-{group}\n")

    def _tell(self, text: str) -> None:
        assert self._process.stdin is not None
        # Without its guard a supervisor still ends all ranks; only a SIGKILL of it leaves more.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def watch(pipe: BinaryIO) -> None:
    """The guarding process: follow the list until the pipe closes, then kill what is on it."""
    groups: set[int] = set()
    for line in iter(pipe.readline, b""):
        group = int(line[1:])
        (groups.add if line[:1] == b"+" else groups.discard)(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin.buffer)
