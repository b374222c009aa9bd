"""Load: any checkpoint into any layout, every byte checked. Collective over all ranks, or alone."""

import logging
import os
import time
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner import LoadPlanner as DcpLoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from lmscale.checkpoint.tensor_format import TORCH, TensorLocation, from_table
from lmscale.checkpoint.tensor_io import BlockReader, fill
from lmscale.checkpoint.torch_dcp import LoadPlanner, agreed_outcome
from lmscale.distributed.process_group import on_root
from lmscale.run_folder.checkpoints import read_manifest

logger = logging.getLogger(__name__)


def load_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill `tensors` (DTensor, Fragment or plain) in place from a checkpoint folder.

    If a rank fails, all ranks raise the same error and the content of the tensors is undefined:
    CheckpointError (proven damage: fall back to an older checkpoint), its subclass Mismatch (another
    model: do not fall back), RetryableError (the storage failed: list the checkpoints again, then
    retry). Tensors of the checkpoint that are not requested are not read.
    """
    began = time.monotonic()
    # One rank reads the manifest, so that all ranks plan with the same one.
    manifest = on_root(lambda: read_manifest(path))
    with agreed_outcome(f"load of {path.name}"):
        dcp.load(
            dict(tensors), storage_reader=CheckpointReader(path, manifest), planner=LoadPlanner()
        )
    logger.info("loaded %s in %.1f s", path.name, time.monotonic() - began)


def load_weights_one_process(path: Path) -> dict[str, torch.Tensor]:
    """The whole model by parameter name, in host memory. Not collective: no process group is used."""
    manifest = read_manifest(path)
    prefix = "model."
    weights = {
        name: torch.empty(entry["shape"], dtype=TORCH[entry["dtype"]])
        for name, entry in manifest["tensors"].items()
        if name.startswith(prefix)
    }
    with agreed_outcome(f"load of {path.name}"):
        dcp.load(
            dict(weights),
            storage_reader=CheckpointReader(path, manifest),
            planner=LoadPlanner(),
            no_dist=True,
        )
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


class CheckpointReader(StorageReader):
    """DCP's StorageReader for a published checkpoint. `manifest`: its body, the same on all ranks."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]):
        self._directory = directory
        self._files = manifest["files"]
        self._metadata, self._locations = from_table(manifest["tensors"])

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """There is no state between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Names, shapes and boxes of the stored tensors."""
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add on a rank."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to arrange: each rank reads what it needs."""
        return plans

    def read_data(self, plan: LoadPlan, planner: DcpLoadPlanner) -> Future[None]:
        """Fill this rank's tensors in place, file by file, front to back."""

        def location_of(item: ReadItem) -> TensorLocation:
            return self._locations[item.storage_index]

        ordered = sorted(
            plan.items, key=lambda item: (location_of(item).file, location_of(item).begin)
        )
        for name, items in groupby(ordered, key=lambda item: location_of(item).file):
            blocks = BlockReader(self._directory / name, self._files[name])
            try:
                for item in items:
                    target = planner.resolve_tensor(item)
                    fill(target.detach(), location_of(item), item, blocks)
                    planner.commit_tensor(item, target)
            finally:
                blocks.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """The folder is given to the constructor."""
        return True
