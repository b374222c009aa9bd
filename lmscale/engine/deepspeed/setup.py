"""Start DeepSpeed around a model and an optimizer: its configuration, import, groups and engine.

`zero_dict` is pure, so that golden files show every key that is passed to DeepSpeed.

Private names of DeepSpeed that are used here: of its engine seq_data_parallel_group and device (read);
ops.__compatible_ops__, the accelerator's is_fp16_supported and bf16_optimizer's see_memory_usage (set).
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

# Elements per reduction. DeepSpeed's default of 5e8 allocates 2 GB of fp32 in every backward.
_BUCKET = 1 << 24


def zero_dict(engine: EngineConfig, *, parameters: int) -> dict[str, object]:
    """The configuration of a DeepSpeed engine for a model of `parameters` elements on one rank.

    What engine/base.py does is off or neutral here: micro-batches, averages, norm, clipping, overflow,
    loss scale. Stage 0 is configured for fp32 whatever the precision: see stages.Stage0.
    """
    precision = engine.precision if engine.zero_stage else "fp32"
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's statistics; nothing is divided by it
        "gradient_accumulation_steps": 1,  # the boundary is set per micro-batch
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # waits for the device before every forward
        "bf16": {
            "enabled": precision == "bf16",
            "check_grad_overflow": False,
            "immediate_grad_update": True,  # stage 1: free bf16 gradients once they are accumulated
        },
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 1.0,
        },  # step.LossScale is in the loss already
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
    """Elements of one reduction. DeepSpeed requires an even number."""
    return min(_BUCKET, max(parameters, 2)) // 2 * 2


def _stage_3(engine: EngineConfig, parameters: int) -> dict[str, object]:
    if engine.zero_stage != 3:
        return {}
    return {
        # Norms and biases stay whole on every rank: gathering each would cost more than it saves.
        "stage3_param_persistence_threshold": min(100_000, parameters // 512),
        "stage3_prefetch_bucket_size": min(_BUCKET, parameters // 32),
        # DeepSpeed prefetches until this much is gathered, and keeps what is used again soon. The default
        # of 1e9 is all of a smaller model, from its forward to its backward.
        "stage3_max_live_parameters": min(10**9, parameters // 8),
        "stage3_max_reuse_distance": 0,
        # On by default: torch's linear is then replaced, in the whole process, by one that adds the bias in place
        # to a product that selective recomputation keeps. Gradients are then wrong without an error.
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


class _ModelParallelUnit:
    """The groups that DeepSpeed must use, in the form of Megatron's mpu.

    Always passed: DeepSpeed keeps the last mpu in a global and would use a stale one.
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
    """A DeepSpeed engine, whose optimizer updates DeepSpeed's flat tensors from now on. Collective.

    Raises ConfigError for offload to NVMe.
    """
    if engine.offload == "nvme":
        _refuse_nvme()
    # DeepSpeed requires the variable, even in a world of one process without a launcher.
    os.environ.setdefault("LOCAL_RANK", str(mesh.world.local_rank))
    parameters = list(model.parameters())
    wrapper, *_ = _import_deepspeed(parameters[0].device).initialize(
        model=model,
        optimizer=optimizer,
        config=zero_dict(engine, parameters=sum(parameter.numel() for parameter in parameters)),
        mpu=_ModelParallelUnit(mesh),
        dist_init_required=False,
    )
    assert wrapper.seq_data_parallel_group is mesh.dp_group, "DeepSpeed uses other groups"
    return wrapper


def _import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed without its warnings about the accelerator and without compiling kernels."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Stage 1 in bf16 prints a memory report for each parameter group, whatever the logger's level.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # DeepSpeed 0.19 calls what torch 2.13 has renamed, once per step; a user cannot change that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # DeepSpeed checks for fast kernels; torch computes fp16 on any CPU.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    # A minute of compilation, for all-reduces within one host that gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed() -> ModuleType:
    """The package, which `start_deepspeed` has imported. No other module imports it."""
    import deepspeed

    return deepspeed


def _refuse_nvme() -> None:
    raise ConfigError(
        [
            Problem(
                "engine.offload",
                "nvme is not supported: it needs DeepSpeed's async_io extension (libaio-dev), which the "
                "gradient tests do not cover",
                "use all (stage 3) or optimizer: both offload to the CPU's memory",
            )
        ]
    )
