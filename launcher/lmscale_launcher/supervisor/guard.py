"""A process that kills the children of ranks when the supervisor itself is killed.

PR_SET_PDEATHSIG ends the ranks, but their own children do not inherit it. The guard, in a session of
its own, reads a pipe of which only the supervisor has the other end; when it closes, the guard kills the
process groups of the ranks. Run as a script without site-packages: it starts in a few milliseconds.
"""

import contextlib
import os
import signal
import subprocess
import sys
from typing import BinaryIO, Self


class Guard:
    """The supervisor's side: the list of process groups that must not outlive the supervisor."""

    def __init__(self) -> None:
        argv = [sys.executable, "-I", "-S", os.path.abspath(__file__)]
        # Slurm sends its signals to every process of a step. The new process inherits the blocked signals.
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
        """Pid of the guard process."""
        return self._process.pid

    def add(self, group: int) -> None:
        """Add a process group to the list."""
        self._send(f"+{group}\n")

    def remove(self, group: int) -> None:
        """Remove a group that has ended; its number may be reused by other processes."""
        self._send(f"-{group}\n")

    def _send(self, text: str) -> None:
        assert self._process.stdin is not None
        # Without the guard a supervisor still ends all ranks; only after a SIGKILL of it children of ranks stay.
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
    """The guard process: keep the list until the pipe closes, then kill the groups on it."""
    groups: set[int] = set()
    for line in iter(pipe.readline, b""):
        group = int(line[1:])
        (groups.add if line[:1] == b"+" else groups.discard)(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin.buffer)
