"""DistributedDataParallel: every rank holds the whole model; gradients are averaged while they arrive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lmscale.base.batch import Batch, Stream, Sums
from lmscale.config.schema import EngineConfig, OptimConfig
from lmscale.distributed.mesh import Mesh
from lmscale.engine.layout import TpLayout
from lmscale.engine.torch_engine import TorchEngine
from lmscale.parallel.low_precision import LowPrecision


class DdpEngine(TorchEngine):
    """See Engine. bf16: forward and backward see bf16 copies, weights, gradients and moments are fp32."""

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
        self._lowered: Callable[[], Any] = nullcontext
        if engine.precision == "bf16":
            self._lowered = LowPrecision(model, torch.bfloat16)
        self._wrapper = _wrap(model, mesh)
        forward = self._wrapper or model
        super().__init__(model, forward, mesh, optim, layout, layer_stats=layer_stats)
        if self._wrapper is not None:
            self._settle_buckets(self._wrapper)

    @property
    def _copies(self) -> int:
        return self._mesh.dp_size

    _part = ""

    def _prepare_gradients(self, micro_batches: int) -> None:
        """Where gradients are added up, they are added up in DDP's buckets: else there are two of each.

        One micro-batch goes the other way: what autograd makes is moved into the buckets piece by
        piece, which saves a pass over all gradients.
        """
        gradients = [o.parameter.grad for o in self._owned if o.parameter.grad is not None]
        if micro_batches > 1 and gradients:
            torch._foreach_zero_(gradients)
        else:
            super()._release_gradients()

    @contextmanager
    def _micro_step(self, *, last: bool) -> Iterator[None]:
        held = nullcontext() if last or self._wrapper is None else self._wrapper.no_sync()
        with held, self._lowered():
            yield

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor

    def _offset(self, parameter: Tensor) -> int:
        return 0

    def _drop_gathered(self) -> None:
        pass

    def _release_gradients(self) -> None:
        if self._wrapper is None:
            super()._release_gradients()  # else they are views of the buckets, which stay anyway

    def _settle_buckets(self, wrapper: DistributedDataParallel) -> None:
        """One backward of a batch without targets, whose gradients are zeros.

        DDP groups gradients anew after its first backward, by their order of arrival, and a ring's
        order of summation follows from the place in a group: without this the first step after a
        resume would differ in the last bit from the same step of an uninterrupted run.
        """
        device = next(self._model.parameters()).device
        length = 2 * self._mesh.tp_size  # sequence parallelism deals the tokens out
        zeros_BL = torch.zeros(1, length, dtype=torch.int64, device=device)
        stream = Stream(zeros_BL, zeros_BL, None)
        row_B = torch.full((1,), -1, device=device)
        batch = Batch(
            stream, None, zeros_BL, torch.zeros_like(zeros_BL, dtype=torch.float32), row_B
        )
        with self._micro_step(last=True):
            sums: Sums[Tensor] = wrapper(batch)
            sums.loss.backward()


def _wrap(model: nn.Module, mesh: Mesh) -> DistributedDataParallel | None:
    """None where nobody has other samples: there is nobody to average with, and the wrapper costs time and memory."""
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
    """torch's 25 MB, and from 7 ranks on Megatron-LM's 1M gradients a rank: a ring sends bucket / ranks at a time.

    (megatron/core/distributed/distributed_data_parallel_config.py; theirs begins at 40M gradients.)
    """
    return max(25, 4 * ranks)
