"""Delete what a run no longer needs. Rank 0 only; fenced; an interrupted deletion leaves nothing that looks damaged."""

import logging
import shutil
from pathlib import Path

from lmscale.base.errors import RetryableError
from lmscale.run_folder.attempts import check_not_overtaken
from lmscale.run_folder.checkpoints import listing
from lmscale.run_folder.paths import RunFolder, parse_checkpoint_name

logger = logging.getLogger(__name__)


def retain(folder: RunFolder, keep: int, attempt: int) -> list[Path]:
    """Keep the `keep` newest valid checkpoints (one at least); returns the folders deleted.

    Damaged and overtaken ones are neither counted nor deleted: they are evidence, and `lmscale
    verify` names them. Unfinished folders (.tmp) of older attempts are deleted. Storage errors are
    logged and do not end the run.
    """
    try:
        valid = [found.path for found in listing(folder) if found.valid]
    except RetryableError as error:
        logger.warning("older checkpoints stay for now: %s", error)
        return []
    deleted = []
    for path in valid[max(1, keep) :]:
        check_not_overtaken(folder, attempt)
        # Renamed first: a half-deleted folder under its own name would be proof of damage.
        doomed = path.with_name(path.name + ".tmp")
        try:
            if doomed.exists():
                shutil.rmtree(doomed)
            path.rename(doomed)
            deleted.append(path)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("deleting %s: %s; it remains for now", path, error)
    for leftover in _unfinished(folder, attempt):
        check_not_overtaken(folder, attempt)
        shutil.rmtree(leftover, ignore_errors=True)
    return deleted


def _unfinished(folder: RunFolder, attempt: int) -> list[Path]:
    """Folders that older attempts were writing or deleting when they ended.

    An attempt that still lives somewhere fails in its next write there; it is overtaken anyway.
    """
    found = []
    for path in folder.checkpoints.glob("step-*.tmp"):
        parsed = parse_checkpoint_name(path.name.removesuffix(".tmp"))
        if parsed is not None and parsed[1] < attempt:
            found.append(path)
    return found
