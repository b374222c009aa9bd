"""DeepSpeed ZeRO-2: gradients, masters and moments are split over the ranks, weights are whole on each.

The one file that imports deepspeed. DeepSpeed reduces and partitions; counting, norm, clipping and the
decision to skip a step are ours, as for the other engines. Names that are private to DeepSpeed are
read here only: averaged_gradients, single_partition_of_fp32_groups and _hp_mapping.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmscale.batch import Batch, Sums
from lmscale.checkpoint.fragment import Fragment
from lmscale.config.sections import EngineConfig, OptimConfig
from lmscale.dist.mesh import Mesh
from lmscale.engine import account, adam
from lmscale.engine.protocol import StepResult
from lmscale.engine.zero_dict import zero_dict
from lmscale.optim.build import build_adamw, parameter_groups


class ZeroEngine:
    """See Engine. bf16: weights and backward are bf16; reduction, accumulation, masters, moments fp32."""

    def __init__(
        self, model: nn.Module, mesh: Mesh, *, engine: EngineConfig, optim: OptimConfig
    ) -> None:
        # DeepSpeed would turn them to bf16 with the weights, and positions would lose their precision.
        assert not any(buffer.is_floating_point() for buffer in model.buffers())
        self._model = model
        self._mesh = mesh
        self._clip = optim.clip
        self._trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        masters = [parameter.detach().clone() for _, parameter in self._trainable]
        groups = parameter_groups(iter(self._trainable), optim.weight_decay)
        self._adam = build_adamw(groups, optim, fused=True)
        self._engine = _initialize(model, self._adam, mesh, engine)
        self._zero = self._engine.optimizer
        adam.materialise(self._adam)
        self._restore_masters(masters)

    def step(self, micro_batches: Sequence[Batch[Tensor]], *, lr: float) -> StepResult:
        """One optimizer step; see Engine."""
        weight = account.count_targets(micro_batches, self._mesh)
        scale = self._mesh.dp_size / weight  # DeepSpeed averages over dp
        losses = []
        for index, batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            sums: Sums[Tensor] = self._engine(batch)
            scaled = sums.loss * scale.to(sums.loss.dtype)
            self._engine.backward(scaled, scale_wrt_gas=False)
            losses.append(sums.loss.detach())
        with torch.no_grad():
            gradients = [
                gradient
                for group in self._zero.averaged_gradients.values()
                for gradient in group  # slices of this rank's partition, and its zero padding
            ]
            squares = account.sum_of_squares(gradients, weight.device)
            result = account.close(losses, weight, squares, self._mesh)
            account.clip(gradients, result, self._clip)
        adam.prepare(self._adam, lr=lr, applied=result.applied)
        self._engine.step()
        return result

    def evaluate(self, batch: Batch[Tensor]) -> Sums[Tensor]:
        """This rank's sums; see Engine."""
        return cast(Sums[Tensor], self._look(self._model, batch))

    def logits(self, batch: Batch[Tensor]) -> Tensor:
        """[B, L, V] of this rank's batch; see Engine."""
        return cast(Tensor, self._look(cast(Any, self._model).logits, batch))

    def state(self, loading: bool = False) -> dict[str, Tensor]:
        """Live views under neutral names; see Engine."""
        del loading  # weights are gathered after a load, in `loaded`
        found = {
            f"model.{name}": parameter.detach()
            for name, parameter in self._model.named_parameters()
            if not parameter.requires_grad
        }
        for name, parameter in self._trainable:
            found[f"model.{name}"] = self._fragment(parameter, lambda flat: flat.detach())
            for key in adam.MOMENTS:
                found[f"optim.{key}.{name}"] = self._fragment(parameter, self._moment_of(key))
        return found

    def loaded(self, *, optim_step: int) -> None:
        """Finish a load; see Engine."""
        adam.set_count(self._adam, optim_step)
        self._zero.update_lp_params()

    @property
    def optim_step(self) -> int:
        """Updates applied so far."""
        return adam.count(self._adam)

    def _look(self, method: Callable[..., Any], batch: Batch[Tensor]) -> Any:
        self._model.eval()
        try:
            with torch.no_grad():
                return method(batch)
        finally:
            self._model.train()

    def _moment_of(self, key: str) -> Callable[[Tensor], Tensor]:
        return lambda flat: self._adam.state[flat][key]

    def _fragment(self, parameter: nn.Parameter, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """This rank's part of a parameter, taken out of what `pick` finds for its flat group."""
        mapping = _partition_of(parameter)
        group = self._group_of[id(parameter)]
        flat = pick(self._zero.single_partition_of_fp32_groups[group])
        if mapping is None:
            return Fragment(flat[:0], start=0, shape=parameter.shape)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(flat.narrow(0, here.start, here.numel), there.start, parameter.shape)

    @property
    def _group_of(self) -> dict[int, int]:
        return {
            id(parameter): index
            for index, group in enumerate(self._zero.bit16_groups)
            for parameter in group
        }

    @torch.no_grad()
    def _restore_masters(self, masters: Sequence[Tensor]) -> None:
        """Undo a rounding: DeepSpeed takes its fp32 masters from weights that are bf16 by then."""
        for (_, parameter), master in zip(self._trainable, masters, strict=True):
            mapping = _partition_of(parameter)
            if mapping is not None:
                there = mapping.lp_fragment_address
                mapping.hp_fragment.copy_(master.view(-1).narrow(0, there.start, there.numel))


class _Groups:
    """The groups DeepSpeed shall use, in the form of Megatron's mpu.

    Always handed over: DeepSpeed keeps the last mpu in a global and would take up a stale one.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> Any:
        return self._mesh.dp_group

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp_size

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_rank

    def get_model_parallel_group(self) -> Any:
        return self._mesh.device_mesh["tp"].get_group()

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def _partition_of(parameter: nn.Parameter) -> Any:
    """Where this rank's partition holds a part of the parameter; None where it holds nothing of it."""
    return cast(Any, parameter)._hp_mapping


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, engine: EngineConfig
) -> Any:
    # It insists on the variable, also in a world of one that nobody launched.
    os.environ.setdefault("LOCAL_RANK", str(mesh.world.local_rank))
    parameters = list(model.parameters())
    wrapper, *_ = _deepspeed(parameters[0].device).initialize(
        model=model,
        optimizer=optimizer,
        config=zero_dict(engine, parameters=sum(parameter.numel() for parameter in parameters)),
        mpu=_Groups(mesh),
        dist_init_required=False,
    )
    return wrapper


def _deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, told what it would otherwise find out with warnings, and kept from compiling kernels."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls what torch 2.13 has renamed, once a step; a user can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # A minute of compilation, for all-reduces within one host that gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
