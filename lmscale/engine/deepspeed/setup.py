"""Our words -> DeepSpeed's. Pure, so that golden files show every key we send.

Starting DeepSpeed: its import, the groups it talks over, and its engine around our model and optimizer.

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

from lmscale.base.errors import ConfigError, Problem
from lmscale.config.schema import EngineConfig
from lmscale.distributed.mesh import Mesh

# Elements of a reduction. DeepSpeed's default of 5e8 allocates 2 GB of fp32 in every backward.
_BUCKET = 1 << 24


def zero_dict(engine: EngineConfig, *, parameters: int) -> dict[str, object]:
    """The configuration of a DeepSpeed engine for a model of so many parameters on one rank.

    What we count ourselves is off or neutral here: micro-batches, averages, norm, clipping, overflow,
    loss scale. Stage 0 is told fp32 whatever the precision: see zero_whole.py.
    """
    precision = engine.precision if engine.zero_stage else "fp32"
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's statistics; nothing is divided by it
        "gradient_accumulation_steps": 1,  # the boundary is set by hand, micro-batch by micro-batch
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # waits for the device before every forward
        "bf16": {
            "enabled": precision == "bf16",
            "check_grad_overflow": False,
            "immediate_grad_update": True,  # of stage 1: free bf16 gradients as soon as they are added up
        },
        "fp16": {"enabled": precision == "fp16", "loss_scale": 1.0},  # ours is in the loss already
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's AdamW: nothing to compile
        "zero_force_ds_cpu_optimizer": False,  # likewise where it is offloaded
        "zero_optimization": {
            "stage": engine.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": bucket_size(parameters),
            "allgather_bucket_size": bucket_size(parameters),
            **_stage_3(engine, parameters),
            **_offload(engine),
        },
    }


def bucket_size(parameters: int) -> int:
    """Elements of one reduction. DeepSpeed wants even numbers."""
    return min(_BUCKET, max(parameters, 2)) // 2 * 2


def _stage_3(engine: EngineConfig, parameters: int) -> dict[str, object]:
    if engine.zero_stage != 3:
        return {}
    return {
        # Norms and biases stay whole on every rank: a gather each would cost more than they weigh.
        "stage3_param_persistence_threshold": min(100_000, parameters // 512),
        "stage3_prefetch_bucket_size": min(_BUCKET, parameters // 32),
        # DeepSpeed looks ahead until this much is gathered, and keeps what it has seen to come again. By
        # default 1e9: all of a smaller model, from its forward to its backward.
        "stage3_max_live_parameters": min(10**9, parameters // 8),
        "stage3_max_reuse_distance": 0,
        # On by default: torch's linear is then replaced, in the whole process, by one that adds the bias in place
        # to a product that selective recomputation keeps. Gradients are wrong, and nothing says so.
        "memory_efficient_linear": False,
    }


def _offload(engine: EngineConfig) -> dict[str, object]:
    cpu = {"device": "cpu"}
    match engine.offload:
        case "optimizer":
            return {"offload_optimizer": cpu}
        case "all":
            return {"offload_optimizer": cpu, "offload_param": cpu}
        case _:
            return {}


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
