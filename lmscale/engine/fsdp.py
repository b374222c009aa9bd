"""FSDP2: weights, gradients and moments are split over the data-parallel ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lmscale.config.sections import EngineConfig, OptimConfig
from lmscale.dist.mesh import Mesh
from lmscale.engine.native import NativeEngine, Owned
from lmscale.parallel.shard import ShardPolicy, shard


class FsdpEngine(NativeEngine):
    """See Engine. bf16: gathered weights are bf16, shards, gradients and moments fp32."""

    def __init__(
        self, model: nn.Module, mesh: Mesh, *, engine: EngineConfig, optim: OptimConfig
    ) -> None:
        compute = torch.bfloat16 if engine.precision == "bf16" else None
        self._root = shard(model, mesh, ShardPolicy(compute, engine.reshard_after_forward))
        # Its hooks stand around `forward` only; without them logits would meet the root's shards.
        register_fsdp_forward_method(model, "logits")
        super().__init__(model, model, mesh, optim)

    _copies = 1

    @contextmanager
    def _micro_step(self, *, reduce: bool) -> Iterator[None]:
        # Until the last micro-batch gradients add up unreduced, in fp32: one reduction a step.
        self._root.set_requires_gradient_sync(reduce)
        yield

    def _local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        with torch.no_grad():
            return tensor.to_local().requires_grad_(tensor.requires_grad)

    def _global(self, owned: Owned, moment: Tensor) -> Tensor:
        parameter = owned.parameter
        assert isinstance(parameter, DTensor)
        return DTensor.from_local(
            moment,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,  # explicit: shards may be uneven
            stride=parameter.stride(),
        )

    def _drop_gathered(self) -> None:
        # The root stays gathered after a forward without a backward; a load would not reach it.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
