"""FSDP2: weights, gradients and moments are sharded over ranks; HSDP: over the ranks of each replica."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lmscale.engine.base import EngineInputs
from lmscale.engine.torch_engine import TorchEngine
from lmscale.parallel.shard import ShardPolicy, rows_before, shard


class FsdpEngine(TorchEngine):
    """Shards, gradients and moments are fp32 (or fp64); with bf16 the gathered weights are bf16."""

    def __init__(self, inputs: EngineInputs) -> None:
        engine, mesh = inputs.engine, inputs.mesh
        policy = ShardPolicy(
            compute=torch.bfloat16 if engine.precision == "bf16" else None,
            reshard_after_forward=engine.reshard_after_forward,
            offload=engine.offload == "all",
        )
        self._root = shard(inputs.model, mesh, policy)
        # FSDP's hooks surround `forward` only; without this call logits would read the root's shards.
        register_fsdp_forward_method(inputs.model, "logits")
        self._piece = f"shard {mesh.shard_rank}/{mesh.shard_size}"
        super().__init__(inputs, inputs.model, gradient_copies=mesh.replicate_size)

    @override
    @contextmanager
    def _micro_step(self, *, last: bool) -> Iterator[None]:
        # Every backward reduces over the shard axis, so that a rank never keeps the gradient of more
        # than its shard; the copies of HSDP are summed once per step.
        self._root.set_requires_all_reduce(last)
        yield

    @override
    def _local(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        with torch.no_grad():
            return tensor.to_local().requires_grad_(tensor.requires_grad)

    @override
    def _offset(self, parameter: Tensor) -> int:
        rows, *row = parameter.shape
        return rows_before(rows, self._mesh) * prod(row)

    @override
    def _release_gathered(self) -> None:
        # The root stays gathered after a forward without a backward, and the next forward would not
        # see what a load writes into the shards.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
