"""Verbs that need torch or many cores: this process becomes `python -m lmscale VERB ...`."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn


def command(verb: str, argv: Sequence[str]) -> list[str]:
    """The command line of a rank, or of any verb that runs in lmscale itself."""
    # -P: without it a file random.py in the current directory would be imported instead of Python's.
    return [sys.executable, "-P", "-m", "lmscale", verb, *argv]


def hand_off(verb: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> NoReturn:
    """Replace this process, so that signals and the exit code are the verb's own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command(verb, argv), dict(os.environ if env is None else env))
