"""DeepSpeed's ZeRO, stages 0 to 3, behind the same step as the other engines.

DeepSpeed reduces, partitions and gathers. Counting, norm, clipping, the loss scale and the decision to
skip a step are those of engine/base.py, so DeepSpeed's own are off or neutral (setup.py). Only this
package uses DeepSpeed; each module names the private attributes that it reads, because no release
guarantees any of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lmscale.base.batch import Batch, Sums
from lmscale.config.schema import EngineConfig
from lmscale.distributed.mesh import Mesh
from lmscale.engine.base import Engine, EngineInputs, Weight
from lmscale.engine.deepspeed.setup import start_deepspeed
from lmscale.engine.deepspeed.stages import Bf16Stage12, Stage0, Stage3, Stage12, ZeroStage
from lmscale.engine.step import MOMENTS, LossScale, create_moments
from lmscale.optim.optimizer import build_adamw, parameter_groups
from lmscale.parallel.low_precision import LowPrecision

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DeepSpeedEngine(Engine):
    """With bf16 and fp16, weights and backward are in that type; reduction, masters and moments are fp32."""

    def __init__(self, inputs: EngineInputs) -> None:
        model, mesh, engine = inputs.model, inputs.mesh, inputs.engine
        # DeepSpeed would convert them with the weights, and positions would lose their precision.
        assert not any(buffer.is_floating_point() for buffer in model.buffers())
        low = _LOW.get(engine.precision)
        low_precision = None
        if low is not None and engine.zero_stage == 0:
            low_precision = LowPrecision(model, low)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = parameter_groups(iter(named), inputs.optim.weight_decay)
        self._optimizer = build_adamw(groups, inputs.optim, fused=True)
        exact = None
        if low is not None and engine.zero_stage:
            # DeepSpeed takes its fp32 masters from weights that it has just rounded.
            exact = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._wrapper = start_deepspeed(model, self._optimizer, mesh, engine)
        self._stage = _stage_of(self._wrapper, model, mesh, engine, exact)
        super().__init__(inputs, gradient_copies=self._stage.gradient_copies)
        with self._parameters_attached():
            create_moments(self._optimizer)
        if engine.precision == "fp16":
            self._loss_scale = LossScale(self._wrapper.device)
        if low_precision is not None:
            self._low_precision = low_precision

    @override
    def state(self, loading: bool = False) -> dict[str, Tensor]:
        del loading  # gathered weights are gathered again by finish_load
        state = {}
        for part in (*self._stage.trainable, *self._stage.frozen):
            state[f"model.{part.name}"] = self._layout.fragment(
                part.name, part.select(part.flat), start=part.start, shape=part.shape
            )
        for part in self._stage.trainable:
            moments = self._optimizer.state[part.flat]
            for key in MOMENTS:
                state[f"optim.{key}.{part.name}"] = self._layout.fragment(
                    part.name, part.select(moments[key]), start=part.start, shape=part.shape
                )
        return state

    @override
    def weights(self) -> Iterator[Weight]:
        for name, parameter in self._model.named_parameters():
            stored, _ = self._stage.stored_weight(parameter)
            yield Weight(name, self._layout.piece(name, self._stage.dp_piece), stored)

    @override
    def _forward(self, batch: Batch[Tensor]) -> Sums[Tensor]:
        return cast(Sums[Tensor], self._wrapper(batch))

    @override
    def _backward(self, loss: Tensor) -> None:
        self._wrapper.backward(loss, scale_wrt_gas=False)

    @override
    def _micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        self._wrapper.set_gradient_accumulation_boundary(last)
        return nullcontext()

    @override
    def _reduce_gradients(self) -> None:
        self._stage.reduce_gradients()

    @override
    def _gradients(self) -> Mapping[str, Tensor]:
        parts = zip(self._stage.trainable, self._stage.gradients(), strict=True)
        return {part.name: gradient for part, gradient in parts}

    @property
    @override
    def _optimizer_device(self) -> torch.device:
        return self._stage.optimizer_device

    @override
    def _apply_update(self) -> None:
        self._stage.apply_update()

    @override
    def _parameters_attached(self) -> AbstractContextManager[Any]:
        return self._stage.parameters_attached()

    @override
    def _refresh_weights(self) -> None:
        self._stage.refresh_weights()

    @override
    def _release_gathered(self) -> None:
        self._stage.release_gathered()


def _stage_of(
    wrapper: Any,
    model: nn.Module,
    mesh: Mesh,
    engine: EngineConfig,
    exact: Mapping[str, Tensor] | None,
) -> ZeroStage:
    match engine.zero_stage:
        case 0:
            return Stage0(wrapper, model, mesh)
        case 3:
            return Stage3(wrapper, model, mesh, exact)
        case 1 if engine.precision == "bf16" and engine.offload == "none":
            return Bf16Stage12(wrapper, model, mesh, exact)
        case _:
            return Stage12(wrapper, model, mesh, exact)
