"""Our words -> DeepSpeed's. Pure, so that golden files show every key we send."""

from lmscale.config.sections import EngineConfig

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
