"""Starting DeepSpeed: its import, the groups it talks over, and its engine around our model and optimizer.

Private names of DeepSpeed: its engine's seq_data_parallel_group and device are read; ops.__compatible_ops__,
the accelerator's is_fp16_supported and bf16_optimizer's see_memory_usage are set.
"""

import logging
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lmscale.config.sections import EngineConfig
from lmscale.dist.mesh import Mesh
from lmscale.engine.zero_dict import zero_dict
from lmscale.errors import ConfigError, Problem


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
        return self._mesh.tp_group

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def start_deepspeed(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, engine: EngineConfig
) -> Any:
    """A DeepSpeed engine. Its optimizer now updates what DeepSpeed has made of the parameters. Collective."""
    if engine.offload == "nvme":
        _refuse_nvme()
    # It insists on the variable, also in a world of one that nobody launched.
    os.environ.setdefault("LOCAL_RANK", str(mesh.world.local_rank))
    parameters = list(model.parameters())
    wrapper, *_ = _load(parameters[0].device).initialize(
        model=model,
        optimizer=optimizer,
        config=zero_dict(engine, parameters=sum(parameter.numel() for parameter in parameters)),
        mpu=_Groups(mesh),
        dist_init_required=False,
    )
    assert wrapper.seq_data_parallel_group is mesh.dp_group, "DeepSpeed took up other groups"
    return wrapper


def _load(device: torch.device) -> ModuleType:
    """DeepSpeed, told what it would otherwise find out with warnings, and kept from compiling kernels."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Stage 1 in bf16 prints a memory report for each parameter group, whatever the logger's level.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # DeepSpeed 0.19 calls what torch 2.13 has renamed, once a step; a user can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # It asks for fast kernels; torch computes fp16 on any CPU.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    # A minute of compilation, for all-reduces within one host that gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed() -> ModuleType:
    """The package, loaded. No other file imports it."""
    import deepspeed

    return deepspeed


def _refuse_nvme() -> None:
    raise ConfigError(
        [
            Problem(
                "engine.offload",
                "nvme needs DeepSpeed's async_io, which is built with libaio-dev and was never run here",
                "use all (stage 3) or optimizer: both offload to the CPU's memory",
            )
        ]
    )
