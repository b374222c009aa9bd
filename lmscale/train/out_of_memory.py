"""Out of memory, as an error that lists the settings which need less memory, the cheapest first."""

from collections.abc import Iterator

from lmscale.base.errors import ConfigError, Problem
from lmscale.config.schema import RunConfig


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
    settings = []
    if cfg.train.micro_batch_size > 1:
        settings.append(
            f"train.micro_batch_size={max(1, cfg.train.micro_batch_size // 2)} "
            f"(now {cfg.train.micro_batch_size}): the losses do not change"
        )
    settings += [*_recompute(cfg), *_split(cfg)]
    settings.append(
        "a shorter train.seq_len or a smaller model: another run, in another train.run_dir"
    )
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError([Problem("memory", f"out of memory: {first}", "; or ".join(settings))])


def _recompute(cfg: RunConfig) -> Iterator[str]:
    """Fewer bytes of activations, the cheaper first."""
    mode = cfg.engine.activation_checkpointing
    if mode == "none":
        yield (
            "engine.activation_checkpointing=selective: recomputes all but matrix products and attention, "
            "a few per cent more time"
        )
    if mode != "full":
        yield "engine.activation_checkpointing=full: about a third more compute, far fewer activations"
    if cfg.engine.precision == "fp32":
        yield "engine.precision=bf16: half the activations"


def _split(cfg: RunConfig) -> Iterator[str]:
    """Fewer bytes of parameters, gradients and optimizer state, and of what each rank computes at once."""
    engine, parallel = cfg.engine, cfg.parallel
    if not engine.traits.splits_state:
        yield "engine.kind=fsdp: parameters, gradients and optimizer state are split over the ranks"
    if engine.traits.uses_zero_stage and engine.zero_stage < 3:
        yield "engine.zero_stage=3: parameters are split over the ranks, too"
    yield "more ranks (--nproc, cluster.nodes): with fsdp and deepspeed each holds a smaller part"
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield "parallel.sequence_parallel=true: activations at the norms are split over the tp ranks, too"
    wider, model = 2 * parallel.tp, cfg.model
    if not any(
        size % wider for size in (model.num_heads, model.num_kv_heads, model.ffn_hidden_size)
    ):
        yield f"parallel.tp={wider}, inside one node: splits the weights and activations of every layer"
    if engine.offload == "none":
        if engine.traits.uses_zero_stage and engine.zero_stage > 0:
            yield "engine.offload=optimizer: the optimizer works in the host's memory, much slower"
        elif engine.traits.shards_parameters:
            yield "engine.offload=all: parameters and optimizer in the host's memory, much slower"
