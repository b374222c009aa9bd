"""One thing looked at: what it is, how it is, what to do about it.

`lmscale doctor`: everything looked at, as one table.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the table. A warning lets training start; a failure would end it."""

    level: Level
    what: str  # short, e.g. "free space"
    fact: str  # with the values
    hint: str = ""  # the next action; beside an ok: worth knowing

    def __str__(self) -> str:
        return f"{self.what}: {self.fact}" + (f"; {self.hint}" if self.hint else "")


def ok(what: str, fact: str, hint: str = "") -> Finding:
    """All is well."""
    return Finding("ok", what, fact, hint)


def warn(what: str, fact: str, hint: str) -> Finding:
    """Worth a change, but training can start."""
    return Finding("warn", what, fact, hint)


def fail(what: str, fact: str, hint: str) -> Finding:
    """Training would not start, or would end."""
    return Finding("fail", what, fact, hint)


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Those that forbid a start."""
    return [one for one in findings if one.level == "fail"]
