"""The result of one check: its name, the fact, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table of `lmscale doctor`. Training can start with warnings, but not with a failure."""

    level: Level
    what: str  # short, e.g. "free space"
    fact: str  # with the values
    hint: str = ""  # the next action; with ok: additional information

    def __str__(self) -> str:
        return f"{self.what}: {self.fact}" + (f"; {self.hint}" if self.hint else "")


def ok(what: str, fact: str, hint: str = "") -> Finding:
    """The check passed."""
    return Finding("ok", what, fact, hint)


def warn(what: str, fact: str, hint: str) -> Finding:
    """Something should be changed, but training can start."""
    return Finding("warn", what, fact, hint)


def fail(what: str, fact: str, hint: str) -> Finding:
    """Training would not start, or would fail."""
    return Finding("fail", what, fact, hint)


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that forbid a start."""
    return [finding for finding in findings if finding.level == "fail"]
