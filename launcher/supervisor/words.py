"""How something ended, for people."""

import contextlib
import signal

from lmscale.errors import ExitCode


def describe(code: int) -> str:
    """An exit code in words."""
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"died by {signal.Signals(code - 128).name}, {code}"
    with contextlib.suppress(ValueError):
        return f"{ExitCode(code).name.lower()}, {code}"
    return str(code)
