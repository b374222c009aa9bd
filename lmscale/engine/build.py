"""From the run file to an engine."""

from typing import cast

import torch
from torch import nn

from lmscale.config.engine_kinds import ENGINE_KINDS
from lmscale.config.schema import RunConfig
from lmscale.distributed.mesh import Mesh
from lmscale.engine.base import Engine, EngineInputs
from lmscale.engine.layout import TpLayout
from lmscale.parallel.passes import parallelize


def build_engine(cfg: RunConfig, model: nn.Module, mesh: Mesh, device: torch.device) -> Engine:
    """An engine around `model`, which is moved to the device and changed in place. Collective.

    The caller must not use the model directly afterwards.
    """
    model.to(
        device=device, dtype=torch.float64 if cfg.engine.precision == "fp64" else torch.float32
    )
    parallelize(model, mesh, engine=cfg.engine, parallel=cfg.parallel)
    engine_class = ENGINE_KINDS[cfg.engine.kind].load()
    inputs = EngineInputs(
        model=model,
        mesh=mesh,
        engine=cfg.engine,
        optim=cfg.optim,
        layout=TpLayout(mesh, sequence_parallel=cfg.parallel.sequence_parallel),
        layer_stats=cfg.log.layer_stats,
    )
    return cast(Engine, engine_class(inputs))
