"""What a user reads when something is wrong, and the exit codes that schedulers and supervisors read.

User input and the outside world raise one of these; broken invariants of ours are plain `assert`s.
A message names the place, the fact and the next action.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Codes a process of ours ends with. 128+n (died by signal n without saving) is not listed."""

    DONE = 0  # finished, or stopped at train.stop_at
    BUG = 1  # an exception nobody expected
    USAGE = 2  # command line
    DATA = 65  # damaged data, or no undamaged checkpoint left
    RETRY = 75  # peer lost, rendezvous, I/O, full disk: the same command may succeed later
    CONFIG = 78  # configuration, out of memory included
    SAVED = 85  # saved and stopped on request
    DIVERGED = 86
    OVERTAKEN = 87  # a newer attempt of the same run has taken over


# Failures that stand: the next start of the same run would end the same way, so nobody makes one.
FINAL = frozenset(
    {ExitCode.OVERTAKEN, ExitCode.CONFIG, ExitCode.DATA, ExitCode.DIVERGED, ExitCode.USAGE}
)

_PRECEDENCE = (
    ExitCode.OVERTAKEN,
    ExitCode.CONFIG,
    ExitCode.DATA,
    ExitCode.DIVERGED,
    ExitCode.USAGE,
    ExitCode.BUG,
)


def decisive(codes: Iterable[int]) -> int:
    """The one exit code that speaks for several ranks: the first in the order of ExitCode's meaning.

    A rank that died by a signal (128+n, or Popen's -n) ranks behind a bug and before RETRY: the peers
    that lost it report RETRY, and the cause is more telling than the consequence.
    """
    seen = [code if code >= 0 else 128 - code for code in codes]
    for wanted in _PRECEDENCE:
        if wanted in seen:
            return int(wanted)
    died = [code for code in seen if code > 128]
    if died:
        return died[0]
    for wanted in (ExitCode.RETRY, ExitCode.SAVED):
        if wanted in seen:
            return int(wanted)
    unknown = [code for code in seen if code != 0]
    return unknown[0] if unknown else int(ExitCode.DONE)


def is_restartable(code: int) -> bool:
    """Whether a start that ended with this code may be followed by another one without a request."""
    return code in (ExitCode.RETRY, ExitCode.BUG) or code > 128


class LmscaleError(Exception):
    """Root of everything raised on purpose; `exit_code` is what the process ends with."""

    exit_code: ExitCode = ExitCode.BUG


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the run file or the command line."""

    path: str  # dotted key, e.g. "optim.lr"
    fact: str  # what is wrong, with the value
    hint: str = ""  # the next action


class ConfigError(LmscaleError):
    """The run cannot be what the user asked for; all problems are reported together."""

    exit_code = ExitCode.CONFIG

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1 and not self.problems[0].path:
            only = self.problems[0]
            return only.fact + (f"\n  hint: {only.hint}" if only.hint else "")
        count = len(self.problems)
        lines = [f"{count} problem{'s' if count != 1 else ''}"]
        for problem in self.problems:
            lines.append(
                f"  - {problem.path}: {problem.fact}" if problem.path else f"  - {problem.fact}"
            )
            if problem.hint:
                lines.append(f"      hint: {problem.hint}")
        return "\n".join(lines)


class UsageError(LmscaleError):
    """The command line itself is wrong."""

    exit_code = ExitCode.USAGE


class DataError(LmscaleError):
    """A corpus is missing, damaged or not what the run expects."""

    exit_code = ExitCode.DATA


class CheckpointError(LmscaleError):
    """A checkpoint is proven damaged and there is nothing sound to fall back to."""

    exit_code = ExitCode.DATA


class RetryableError(LmscaleError):
    """The outside world failed: I/O, a full disk, a rendezvous. The same command may succeed later."""

    exit_code = ExitCode.RETRY


class DistributedError(RetryableError):
    """A peer is gone or did not answer in time."""


class Diverged(LmscaleError):
    """Loss or gradients are not finite, more often than optim.max_nonfinite_steps allows."""

    exit_code = ExitCode.DIVERGED


class Overtaken(LmscaleError):
    """A newer attempt of this run exists; this one must neither publish nor delete."""

    exit_code = ExitCode.OVERTAKEN
