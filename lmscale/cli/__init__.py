"""The command line: one program for all verbs, started as `lmscale` or as `python -m lmscale`."""

from lmscale.cli.entry import main

__all__ = ["main"]
