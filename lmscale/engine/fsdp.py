"""FSDP2: weights, gradients and moments are split over ranks; HSDP: over those of each of several copies."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lmscale.config.schema import EngineConfig, OptimConfig
from lmscale.distributed.mesh import Mesh
from lmscale.engine.layout import TpLayout
from lmscale.engine.torch_engine import TorchEngine
from lmscale.parallel.shard import ShardPolicy, rows_before, shard


class FsdpEngine(TorchEngine):
    """See Engine. bf16: gathered weights are bf16, shards, gradients and moments fp32."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        engine: EngineConfig,
        optim: OptimConfig,
        layout: TpLayout,
        layer_stats: bool,
    ) -> None:
        policy = ShardPolicy(
            compute=torch.bfloat16 if engine.precision == "bf16" else None,
            reshard_after_forward=engine.reshard_after_forward,
            offload=engine.offload == "all",
        )
        self._root = shard(model, mesh, policy)
        # Its hooks stand around `forward` only; without them logits would meet the root's shards.
        register_fsdp_forward_method(model, "logits")
        super().__init__(model, model, mesh, optim, layout, layer_stats=layer_stats)

    @property
    def _copies(self) -> int:
        return self._mesh.replicate_size

    @property
    def _part(self) -> str:
        return f"shard {self._mesh.shard_rank}/{self._mesh.shard_size}"

    def _prepare_gradients(self, micro_batches: int) -> None:
        pass

    @contextmanager
    def _micro_step(self, *, last: bool) -> Iterator[None]:
        # Every backward reduces over the shard axis, so that a rank never keeps the gradient of more
        # than its shard; the copies of HSDP are added up once a step.
        self._root.set_requires_all_reduce(last)
        yield

    def _local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        with torch.no_grad():
            return tensor.to_local().requires_grad_(tensor.requires_grad)

    def _offset(self, parameter: Tensor) -> int:
        rows, *row = parameter.shape
        return rows_before(rows, self._mesh) * prod(row)

    def _drop_gathered(self) -> None:
        # The root stays gathered after a forward without a backward; a load would not reach it.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
