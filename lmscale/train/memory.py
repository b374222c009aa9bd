"""Out of memory, explained in words, with the levers in the order in which they cost least."""

from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, Problem


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is CUDA's or the CPU allocator's out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text
        or "CUDA out of memory" in text
        or "not enough memory" in text
    )


def explained(cfg: RunConfig, error: BaseException) -> ConfigError:
    """The error a user reads: what ran out, and which settings need less."""
    levers = []
    if cfg.train.micro_batch > 1:
        levers.append(
            f"train.micro_batch={max(1, cfg.train.micro_batch // 2)} (now {cfg.train.micro_batch}): the same "
            "losses, for the global batch stays"
        )
    if cfg.engine.activation_checkpointing != "full":
        levers.append(
            "engine.activation_checkpointing=full: about a third more compute, far fewer activations"
        )
    if cfg.engine.precision == "fp32":
        levers.append("engine.precision=bf16: half the activations")
    if cfg.engine.kind == "ddp":
        levers.append(
            "engine.kind=fsdp: parameters, gradients and optimizer state are split over the ranks"
        )
    levers.append(
        "more ranks (--nproc, cluster.nodes): with fsdp and deepspeed each holds a smaller part"
    )
    levers.append(
        "a shorter train.seq_len or a smaller model: another run, in another train.run_dir"
    )
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError([Problem("memory", f"out of memory: {first}", "; or ".join(levers))])
