"""DistributedDataParallel: every rank holds the whole model; gradients are averaged while they arrive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lmscale.batch import Batch, Stream, Sums
from lmscale.config.sections import EngineConfig, OptimConfig
from lmscale.dist.mesh import Mesh
from lmscale.engine.native import NativeEngine, Owned
from lmscale.parallel.lowered import Lowered


class DdpEngine(NativeEngine):
    """See Engine. bf16: forward and backward see bf16 copies, weights, gradients and moments are fp32."""

    def __init__(
        self, model: nn.Module, mesh: Mesh, *, engine: EngineConfig, optim: OptimConfig
    ) -> None:
        self._lowered: Callable[[], Any] = nullcontext
        if engine.precision == "bf16":
            self._lowered = Lowered(model, torch.bfloat16)
        self._wrapper = _wrap(model, mesh)
        super().__init__(model, self._wrapper or model, mesh, optim)
        if self._wrapper is not None:
            self._settle_buckets(self._wrapper)

    @property
    def _copies(self) -> int:
        return self._mesh.dp_size

    @contextmanager
    def _micro_step(self, *, reduce: bool) -> Iterator[None]:
        held = nullcontext() if reduce or self._wrapper is None else self._wrapper.no_sync()
        with held, self._lowered():
            yield

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor

    def _global(self, owned: Owned, moment: Tensor) -> Tensor:
        return moment

    def _drop_gathered(self) -> None:
        pass

    def _settle_buckets(self, wrapper: DistributedDataParallel) -> None:
        """One backward of a batch without targets, whose gradients are zeros and thrown away.

        DDP groups gradients anew after its first backward, by their order of arrival, and a ring's
        order of summation follows from the place in a group: without this the first step after a
        resume would differ in the last bit from the same step of an uninterrupted run.
        """
        device = next(self._model.parameters()).device
        zeros_BL = torch.zeros(1, 2, dtype=torch.int64, device=device)
        stream = Stream(zeros_BL, zeros_BL, None)
        row_B = torch.full((1,), -1, device=device)
        batch = Batch(
            stream, None, zeros_BL, torch.zeros_like(zeros_BL, dtype=torch.float32), row_B
        )
        with self._micro_step(reduce=True):
            sums: Sums[Tensor] = wrapper(batch)
            sums.loss.backward()
        for owned in self._owned:
            owned.parameter.grad = None


def _wrap(model: nn.Module, mesh: Mesh) -> DistributedDataParallel | None:
    """None in a world of one: there is nobody to average with, and the wrapper costs time and memory."""
    if mesh.dp_size == 1:
        return None
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=mesh.dp_group,
        gradient_as_bucket_view=True,
    )
