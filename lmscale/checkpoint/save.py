"""Save a checkpoint in four steps: plan, copy, write, publish. Collective over all ranks.

    plan      all ranks: which rank writes which box (collective; rank 0 makes the folder first)
    copy      each rank: the tensors of its boxes
    write     each rank: its file, synced
    publish   rank 0: manifest, fence, rename

`save_checkpoint` runs them one after another, and the loop waits. Only `plan` needs the loop's
process group: the other three and the one collective around them can run on a thread with a group
of its own, provided that `copy` then really copies (today it returns views of the live tensors).
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.utils import _DistWrapper

from lmscale.base.errors import DistributedError, LmscaleError, Overtaken
from lmscale.base.fs import fsync_dir, storage_errors
from lmscale.checkpoint.tensor_format import TensorBox, to_table
from lmscale.checkpoint.tensor_io import WrittenFile, write_tensors
from lmscale.checkpoint.torch_dcp import SavePlanner, agreed_outcome
from lmscale.distributed.process_group import on_root
from lmscale.run_folder.attempts import check_not_overtaken
from lmscale.run_folder.checkpoints import FORMAT, publish_folder, write_manifest
from lmscale.run_folder.paths import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveTarget:
    """The place of one checkpoint."""

    folder: RunFolder
    step: int
    attempt: int

    @property
    def final(self) -> Path:
        """The folder after publishing."""
        return self.folder.checkpoint(self.step, self.attempt)

    @property
    def temporary(self) -> Path:
        """The folder while it is written."""
        return self.final.with_name(self.final.name + ".tmp")


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What this rank writes: boxes of tensors, in one file."""

    planner: SavePlanner  # finds the tensor of each item
    plan: SavePlan
    file: str


def save_checkpoint(
    folder: RunFolder,
    tensors: Mapping[str, torch.Tensor],
    *,
    step: int,
    attempt: int,
    body: Mapping[str, Any],
) -> Path:
    """Publish a checkpoint of `tensors` (neutral names, global shapes) and `body` (JSON values).

    Returns its folder. If a rank fails, all ranks raise the same error and nothing is published:
    RetryableError (full disk, I/O), Overtaken, DistributedError. If a checkpoint of this step and
    attempt exists already, it is kept: the state of a step is saved once.
    """
    began = time.monotonic()
    target = SaveTarget(folder, step, attempt)
    if on_root(lambda: _make_folder(target)):
        return target.final
    ranks = _DistWrapper(None, dist.is_initialized(), 0)  # DCP's collectives of objects and errors
    try:
        with agreed_outcome(f"save of {target.final.name}"):
            planned = plan(tensors, ranks)
            ranks.all_reduce(
                "write",
                lambda: write(target, planned, copy(planned)),
                lambda files: publish(target, files, body),
            )
    except DistributedError:
        raise  # a peer may still be writing there; the retention of the next attempt removes it
    except LmscaleError:
        on_root(lambda: _remove(target))
        raise
    logger.info("saved %s in %.1f s", target.final.name, time.monotonic() - began)
    return target.final


def plan(tensors: Mapping[str, torch.Tensor], ranks: _DistWrapper) -> RankPlan:
    """Divide the boxes of all tensors among the ranks, each box once. Collective."""
    planner = SavePlanner()

    def local() -> SavePlan:
        planner.set_up_planner(
            state_dict=dict(tensors), storage_meta=None, is_coordinator=ranks.is_coordinator
        )
        return planner.create_local_plan()

    def global_(local_plans: list[SavePlan]) -> list[SavePlan]:
        plans, _ = planner.create_global_plan(local_plans)
        return [
            replace(plan, storage_data=f"rank-{rank:05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    own = planner.finish_plan(ranks.reduce_scatter("plan", local, global_))
    return RankPlan(planner, own, own.storage_data)


def copy(planned: RankPlan) -> dict[TensorBox, torch.Tensor]:
    """The tensors of this rank's boxes: views, so no step may be trained until `write` has returned."""
    tensors = {}
    for item in planned.plan.items:
        data = item.tensor_data
        assert data is not None, f"{item.index.fqn} is not a tensor"
        location = (tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        box = TensorBox(item.index.fqn, data.properties.dtype, tuple(data.size), *location)
        tensor = planned.planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        tensors[box] = tensor
    return tensors


def write(
    target: SaveTarget, planned: RankPlan, tensors: Mapping[TensorBox, torch.Tensor]
) -> WrittenFile | None:
    """Write and sync this rank's file; None for a rank without boxes, which writes no file."""
    return write_tensors(target.temporary / planned.file, tensors) if tensors else None


def publish(
    target: SaveTarget, files: Sequence[WrittenFile | None], body: Mapping[str, Any]
) -> None:
    """Write the manifest, check the fence, rename; all files are on the disk already. Rank 0 only."""
    written = [file for file in files if file is not None]
    boxes = [(box, file.name, begin) for file in written for box, begin in file.boxes]
    manifest = {
        **body,
        "format": FORMAT,
        "step": target.step,
        "attempt": target.attempt,
        "files": {file.name: file.entry for file in written},
        "tensors": to_table(boxes),
    }
    with storage_errors(f"publishing {target.final}"):
        write_manifest(target.temporary, manifest)
        check_not_overtaken(target.folder, target.attempt)
        publish_folder(target.temporary, target.final)


def _make_folder(target: SaveTarget) -> bool:
    """Make the folder to write into; True if the checkpoint exists already. Rank 0 only."""
    check_not_overtaken(target.folder, target.attempt)
    with storage_errors(f"making {target.temporary}"):
        if target.final.exists():
            return True
        if target.temporary.exists():  # left by a failed save of this attempt
            shutil.rmtree(target.temporary)
        if not target.folder.checkpoints.exists():
            target.folder.checkpoints.mkdir(parents=True)
            fsync_dir(target.folder.path)
        target.temporary.mkdir()
    return False


def _remove(target: SaveTarget) -> None:
    """Remove what a failed save left, unless a newer attempt owns the folder now. Rank 0 only."""
    with suppress(OSError, Overtaken):
        check_not_overtaken(target.folder, target.attempt)
        shutil.rmtree(target.temporary)
