"""From the run file to an engine."""

import torch
from torch import nn

from lmscale.config.run import RunConfig
from lmscale.dist.mesh import Mesh
from lmscale.engine.protocol import Engine
from lmscale.parallel.passes import parallelize


def build_engine(cfg: RunConfig, model: nn.Module, mesh: Mesh, device: torch.device) -> Engine:
    """An engine around `model`, which is moved to the device, changed in place and no longer the caller's.

    Collective.
    """
    model.to(
        device=device, dtype=torch.float64 if cfg.engine.precision == "fp64" else torch.float32
    )
    parallelize(model, mesh, engine=cfg.engine)
    match cfg.engine.kind:
        case "fsdp":
            from lmscale.engine.fsdp import FsdpEngine

            return FsdpEngine(model, mesh, engine=cfg.engine, optim=cfg.optim)
        case "ddp":
            from lmscale.engine.ddp import DdpEngine

            return DdpEngine(model, mesh, engine=cfg.engine, optim=cfg.optim)
        case "deepspeed":
            # Importing deepspeed takes seconds: only who asks for it pays.
            from lmscale.engine.zero import ZeroEngine

            return ZeroEngine(model, mesh, engine=cfg.engine, optim=cfg.optim)
