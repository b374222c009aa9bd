"""Save: all ranks write, one rename publishes. Collective over all ranks.

prepare (root) -> plan (all, torch.distributed.checkpoint) -> write (each rank its file) -> seal (root:
manifest, fence, rename). An asynchronous save will copy the tensors after `prepare` and run the rest on
a thread, with a process group of its own.
"""

import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from lmscale.base.errors import DistributedError, LmscaleError, Overtaken
from lmscale.base.fs import fsync_dir, storage_errors
from lmscale.checkpoint.outcome import as_root, one_outcome
from lmscale.checkpoint.planners import SavePlanner
from lmscale.checkpoint.tensor_io import FilesWriter
from lmscale.run_folder.attempts import check_not_overtaken
from lmscale.run_folder.checkpoints import FORMAT, publish, write_manifest
from lmscale.run_folder.paths import RunFolder

logger = logging.getLogger(__name__)


def save(
    folder: RunFolder,
    tensors: Mapping[str, torch.Tensor],
    *,
    step: int,
    attempt: int,
    body: Mapping[str, Any],
) -> Path:
    """Publish a checkpoint of `tensors` (neutral names, global shapes) and `body` (JSON values).

    Returns its folder. On any rank's failure all ranks raise the same error, and nothing is published:
    RetryableError (full disk, I/O), Overtaken, DistributedError. A checkpoint of this step and attempt
    that is already there is kept: the state of a step is saved once.
    """
    began = time.monotonic()
    final = folder.checkpoint(step, attempt)
    temporary = final.with_name(final.name + ".tmp")
    if as_root(lambda: prepare(folder, temporary, final, attempt)):
        return final

    def sealed(files: dict[str, Any], table: dict[str, Any]) -> None:
        own = {"format": FORMAT, "step": step, "attempt": attempt, "files": files, "tensors": table}
        seal(folder, temporary, final, {**body, **own}, attempt)

    try:
        with one_outcome(f"save of {final.name}"):
            dcp.save(
                dict(tensors),
                storage_writer=FilesWriter(temporary, sealed),
                planner=SavePlanner(),
            )
    except DistributedError:
        raise  # a peer may still be writing there; the next attempt's retention removes it
    except LmscaleError:
        as_root(lambda: remove(folder, temporary, attempt))
        raise
    logger.info("saved %s in %.1f s", final.name, time.monotonic() - began)
    return final


def prepare(folder: RunFolder, temporary: Path, final: Path, attempt: int) -> bool:
    """Make the folder to write into; True when the checkpoint has been published before. Root only."""
    check_not_overtaken(folder, attempt)
    with storage_errors(f"making {temporary}"):
        if final.exists():
            return True
        if temporary.exists():  # of a save of this attempt that failed
            shutil.rmtree(temporary)
        if not folder.checkpoints.exists():
            folder.checkpoints.mkdir(parents=True)
            fsync_dir(folder.path)
        temporary.mkdir()
    return False


def seal(
    folder: RunFolder, temporary: Path, final: Path, body: Mapping[str, Any], attempt: int
) -> None:
    """Manifest, fence, rename: in this order, after all files are on the disk. Root only."""
    with storage_errors(f"publishing {final}"):
        write_manifest(temporary, body)
        check_not_overtaken(folder, attempt)
        publish(temporary, final)


def remove(folder: RunFolder, temporary: Path, attempt: int) -> None:
    """Remove what a failed save left, unless a newer attempt owns the folder now. Root only."""
    with suppress(OSError, Overtaken):
        check_not_overtaken(folder, attempt)
        shutil.rmtree(temporary)
