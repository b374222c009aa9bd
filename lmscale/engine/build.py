"""From the run file to an engine."""

import torch
from torch import nn

from lmscale.config.schema import RunConfig
from lmscale.distributed.mesh import Mesh
from lmscale.engine.base import Engine
from lmscale.engine.layout import TpLayout
from lmscale.parallel.passes import parallelize


def build_engine(cfg: RunConfig, model: nn.Module, mesh: Mesh, device: torch.device) -> Engine:
    """An engine around `model`, which is moved to the device, changed in place and no longer the caller's.

    Collective.
    """
    model.to(
        device=device, dtype=torch.float64 if cfg.engine.precision == "fp64" else torch.float32
    )
    parallelize(model, mesh, engine=cfg.engine, parallel=cfg.parallel)
    # Importing deepspeed takes seconds: only who asks for it pays.
    match cfg.engine.kind:
        case "fsdp":
            from lmscale.engine.fsdp import FsdpEngine as Kind
        case "ddp":
            from lmscale.engine.ddp import DdpEngine as Kind  # type: ignore[assignment]
        case "deepspeed":
            from lmscale.engine.deepspeed.engine import DeepSpeedEngine as Kind  # type: ignore[assignment]
    return Kind(
        model,
        mesh,
        engine=cfg.engine,
        optim=cfg.optim,
        layout=TpLayout(mesh, sequence_parallel=cfg.parallel.sequence_parallel),
        layer_stats=cfg.log.layer_stats,
    )
