"""DistributedDataParallel: every rank has the whole model; gradients are averaged during the backward."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lmscale.base.batch import Batch, Stream, Sums
from lmscale.distributed.mesh import Mesh
from lmscale.engine.base import EngineInputs
from lmscale.engine.torch_engine import TorchEngine
from lmscale.parallel.low_precision import LowPrecision


class DdpEngine(TorchEngine):
    """With bf16, forward and backward use bf16 copies; weights, gradients and moments are fp32."""

    def __init__(self, inputs: EngineInputs) -> None:
        low_precision = None
        if inputs.engine.precision == "bf16":
            low_precision = LowPrecision(inputs.model, torch.bfloat16)
        self._wrapper = _wrap(inputs.model, inputs.mesh)
        forward = self._wrapper or inputs.model
        super().__init__(inputs, forward, gradient_copies=inputs.mesh.dp_size)
        if low_precision is not None:
            self._low_precision = low_precision
        if self._wrapper is not None:
            self._settle_buckets(self._wrapper)

    @override
    def _prepare_gradients(self, micro_batches: int) -> None:
        """Several micro-batches are accumulated in DDP's buckets: else there are two of each gradient.

        One micro-batch takes the other way: autograd's gradients are moved into the buckets one by
        one, which saves a pass over all gradients.
        """
        gradients = [t.parameter.grad for t in self._parameters if t.parameter.grad is not None]
        if micro_batches > 1 and gradients:
            torch._foreach_zero_(gradients)
        else:
            super()._release_gradients()

    @override
    def _micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or self._wrapper is None else self._wrapper.no_sync()

    @override
    def _local(self, tensor: Tensor) -> Tensor:
        return tensor

    @override
    def _offset(self, parameter: Tensor) -> int:
        return 0

    @override
    def _release_gradients(self) -> None:
        if self._wrapper is None:
            super()._release_gradients()  # with it they are views of the buckets, which stay anyway

    def _settle_buckets(self, wrapper: DistributedDataParallel) -> None:
        """One backward of a batch without targets, whose gradients are zeros.

        DDP regroups gradients after its first backward by their order of arrival, and a ring's order
        of summation follows from the position in a group: without this call the first step after a
        resume would differ in the last bit from the same step of an uninterrupted run.
        """
        device = next(self._model.parameters()).device
        length = 2 * self._mesh.tp_size  # sequence parallelism splits the tokens
        zeros_BL = torch.zeros(1, length, dtype=torch.int64, device=device)
        stream = Stream(zeros_BL, zeros_BL, None)
        row_B = torch.full((1,), -1, device=device)
        batch = Batch(
            stream, None, zeros_BL, torch.zeros_like(zeros_BL, dtype=torch.float32), row_B
        )
        with self._micro_step(last=True), self._low_precision():
            sums: Sums[Tensor] = wrapper(batch)
            sums.loss.backward()


def _wrap(model: nn.Module, mesh: Mesh) -> DistributedDataParallel | None:
    """None with one data-parallel rank: nothing is averaged, and the wrapper costs time and memory."""
    if mesh.dp_size == 1:
        return None
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=mesh.dp_group,
        bucket_cap_mb=_bucket_mb(mesh.dp_size),
        gradient_as_bucket_view=True,
    )


def _bucket_mb(ranks: int) -> int:
    """torch's 25 MB, and from 7 ranks Megatron-LM's 1M gradients per rank: a ring sends bucket / ranks at a time.

    (megatron/core/distributed/distributed_data_parallel_config.py; theirs begins at 40M gradients.)
    """
    return max(25, 4 * ranks)
