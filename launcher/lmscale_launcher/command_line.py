"""Command lines that start lmscale again: ranks, probes and the staging of a node."""

import sys
from collections.abc import Sequence


def lmscale_command(verb: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """The command line of `lmscale VERB ARGUMENTS` with this Python, or with `python` on another host."""
    # -P: without it a file random.py in the current directory would be imported instead of Python's.
    return [python, "-P", "-m", "lmscale", verb, *arguments]


def train_command(source: str, overrides: Sequence[str]) -> list[str]:
    """The command line of one rank."""
    return lmscale_command("train", source, *overrides)
