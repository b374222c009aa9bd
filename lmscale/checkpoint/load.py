"""Load: any checkpoint into any layout, every byte checked. Collective over all ranks, or alone."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from lmscale.checkpoint.outcome import as_root, one_outcome
from lmscale.checkpoint.planners import LoadPlanner
from lmscale.checkpoint.tensor_format import TORCH
from lmscale.checkpoint.tensor_io import FilesReader
from lmscale.run_folder.checkpoints import read_manifest

logger = logging.getLogger(__name__)


def load(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill `tensors` (DTensor, Fragment or plain) in place from a checkpoint folder.

    On any rank's failure all ranks raise the same error, and what the tensors hold is undefined:
    CheckpointError (proven damage: fall back), its kind Mismatch (another model: do not), RetryableError
    (the storage failed: list anew, then retry). Tensors of the checkpoint that are not asked for stay.
    """
    began = time.monotonic()
    # One rank reads the manifest: all plan with the same one, and shared storage is asked once.
    manifest = as_root(lambda: read_manifest(path))
    with one_outcome(f"load of {path.name}"):
        dcp.load(dict(tensors), storage_reader=FilesReader(path, manifest), planner=LoadPlanner())
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
    with one_outcome(f"load of {path.name}"):
        dcp.load(
            dict(weights),
            storage_reader=FilesReader(path, manifest),
            planner=LoadPlanner(),
            no_dist=True,
        )
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
