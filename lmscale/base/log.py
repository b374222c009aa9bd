"""Logging for people: info on rank 0, warnings from everyone with their rank."""

import logging
import sys

from lmscale.base.world import World


def configure(world: World, *, verbose: bool = False) -> None:
    """Send lmscale's log lines to standard error. Call once, in a composition root."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if world.size == 1 or world.is_root else f"[r{world.rank}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    level = logging.DEBUG if verbose else logging.INFO if world.is_root else logging.WARNING
    for name in ("lmscale", "lmscale_launcher"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
