"""How a start ended, in words."""

import signal
from contextlib import suppress
from typing import Any

from launcher.jobs.start import Start
from lmscale.errors import FINAL, ExitCode

_WORDS = {
    ExitCode.DONE: "done",
    ExitCode.BUG: "an error nobody expected",
    ExitCode.USAGE: "wrong command line",
    ExitCode.DATA: "damaged data",
    ExitCode.RETRY: "a peer or the storage was lost",
    ExitCode.CONFIG: "configuration",
    ExitCode.SAVED: "saved and stopped on request",
    ExitCode.DIVERGED: "diverged",
    ExitCode.OVERTAKEN: "overtaken by a newer start",
}


def is_final(code: int | None) -> bool:
    """Whether nothing starts the run again after this exit code."""
    return code == ExitCode.DONE or code in FINAL


def code_in_words(code: int) -> str:
    """An exit code in words, with the code: damaged data, 65."""
    if code > 128:
        with suppress(ValueError):
            return f"died by {signal.Signals(code - 128).name}, {code}"
    with suppress(ValueError):
        return f"{_WORDS[ExitCode(code)]}, {code}"
    return f"exit code {code}"


def end_in_words(start: Start) -> str:
    """How a start ended: its exit code and, where it says more, what it wrote."""
    event = start.exit or start.restart or {}
    code = event.get("code")
    if not isinstance(code, int):
        return "ended"
    rank_exit = start.rank_exit if (start.rank_exit or {}).get("code") == code else None
    cause = (
        start.cause if code == ExitCode.RETRY or code > 128 else ""
    )  # else the rank knows better
    told = cause or _telling(rank_exit, code) or start.first_dead or _telling(event, code)
    return f"{code_in_words(code)}: {told}" if told else code_in_words(code)


def without_code(text: str, code: int | None) -> str:
    """A supervisor's words without the exit code they begin with, which is shown in other words."""
    head, _, rest = text.partition("; ")
    return rest if rest and code is not None and head.endswith(f", {code}") else text


def _telling(event: Any, code: int) -> str:
    """The first line of an event's reason, unless it only repeats the exit code."""
    lines = str((event or {}).get("reason") or "").strip().splitlines()
    text = lines[0].strip() if lines else ""
    plain = {str(code), code_in_words(code)}
    with suppress(ValueError):
        name = ExitCode(code).name.lower()
        text = text.removeprefix(f"{name}, {code}: ")
        plain |= {name, f"{name}, {code}"}
    return "" if text in plain else text
