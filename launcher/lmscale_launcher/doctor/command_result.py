"""Run another program and never wait longer for it than its timeout, even when it hangs in the kernel."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of a program. The other fields are valid only where the state is `ended`."""

    state: Literal["ended", "missing", "hung"]
    code: int = 0
    out: str = ""
    err: str = ""
    seconds: float = 0.0

    @property
    def succeeded(self) -> bool:
        """Whether it ended with exit code 0."""
        return self.state == "ended" and self.code == 0

    @property
    def failure(self) -> str:
        """How it failed, in one line: the last line of its output, or its exit code."""
        if self.state == "missing":
            return "not found"
        if self.state == "hung":
            return f"no answer within {self.seconds:.0f} s"
        lines = [line.strip() for line in f"{self.out}\n{self.err}".splitlines()]
        lines = [line for line in lines if any(letter.isalnum() for letter in line)]
        ending = f"killed by signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        return f"{lines[-1]} ({ending})" if lines else ending


class RunningCommand:
    """A program that runs while its caller does other things.

    subprocess.run with a timeout does not help against a driver or a file server that hangs: it kills the
    process and then waits forever, because a process in uninterruptible sleep does not end. Such a process
    is left behind here.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        inherits: int | None = None,
    ) -> None:
        env = os.environ if env is None else env
        self._timeout_s = timeout_s
        self._begun = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        if (program := shutil.which(argv[0], path=env.get("PATH"))) is None:
            return
        try:
            self._process = subprocess.Popen(
                [program, *argv[1:]], env=dict(env), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                pass_fds=() if inherits is None else (inherits,),
            )  # fmt: skip
        except OSError:  # no interpreter for its first line, a wrong architecture
            return

    def result(self) -> CommandResult:
        """Wait for the rest of the timeout."""
        process = self._process
        if process is None:
            return CommandResult("missing")
        left = max(0.0, self._begun + self._timeout_s - time.monotonic())
        try:
            out, err = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            _abandon(process)
            return CommandResult("hung", seconds=self._timeout_s)
        seconds = time.monotonic() - self._begun
        return CommandResult("ended", process.returncode, _text(out), _text(err), seconds)


def run_command(
    argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None
) -> CommandResult:
    """Run a program to its end, or to the end of the timeout."""
    return RunningCommand(argv, timeout_s=timeout_s, env=env).result()


def _abandon(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(
            process.pid, signal.SIGKILL
        )  # it has a session of its own: this kills its children, too
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        process.returncode = -signal.SIGKILL  # treated as dead: Popen must not warn about it later


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
