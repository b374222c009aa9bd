"""Our words -> DeepSpeed's. Pure, so that a golden test shows every key we send."""

from lmscale.config.sections import EngineConfig

# Elements of a reduction. DeepSpeed's default of 5e8 allocates 2 GB of fp32 in every backward.
_BUCKET = 1 << 24


def zero_dict(engine: EngineConfig, *, parameters: int) -> dict[str, object]:
    """The configuration of a DeepSpeed engine for a model of so many parameters.

    What we count ourselves is off or neutral here: micro-batches, averages, norm, clipping, overflow.
    """
    bucket = min(_BUCKET, max(parameters, 2)) // 2 * 2  # DeepSpeed wants even sizes
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's statistics; nothing is divided by it
        "gradient_accumulation_steps": 1,  # the boundary is set by hand, micro-batch by micro-batch
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's AdamW: nothing to compile
        "zero_optimization": {
            "stage": engine.zero_stage,
            "compute_grad_norm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
