"""Conflicts between the keys of engine and parallel: what an engine, a model and a mesh cannot do together.

What they can do, and whether it has been proven right, proven.py knows.
"""

from collections.abc import Callable, Iterator
from math import gcd

from lmscale.config.run import RunConfig
from lmscale.config.sections import EngineConfig
from lmscale.errors import Problem

Check = Callable[[RunConfig], Iterator[Problem]]

_VOCABULARY_MULTIPLE = 128  # the model pads its vocabulary to it, and tp cuts the padded one
# fp16 starts at a scale of 2^16 and halves it at each overflow: that many steps in a row, and a few in reserve.
_FP16_SKIPS = 20
# What engine.zero_stage is when nobody writes it.
_UNUSED_STAGE = EngineConfig.model_fields["zero_stage"].default


def _split_over_tp(cfg: RunConfig) -> Iterator[Problem]:
    tp, model = cfg.parallel.tp, cfg.model
    sizes = {
        "model.heads": model.heads,
        "model.kv_heads": model.kv_heads,
        "model.feed_forward": model.feed_forward,
        f"{_VOCABULARY_MULTIPLE}, of which padded vocabularies are multiples": _VOCABULARY_MULTIPLE,
    }
    most = gcd(*sizes.values())
    hint = f"this model splits over {most} ranks, or over a divisor of that"
    for name, size in sizes.items():
        if not size % tp:
            continue
        shown = f"{name} {size}" if name.startswith("model.") else name
        fact = f"{tp} does not divide {shown}"
        if name == "model.kv_heads" and size < tp:
            fact = f"{tp} ranks cannot share model.kv_heads {size}: each needs a kv head of its own"
        yield Problem("parallel.tp", fact, hint if most > 1 else "use 1: this model does not split")


def _sequence_parallel(cfg: RunConfig) -> Iterator[Problem]:
    tp, length = cfg.parallel.tp, cfg.train.seq_len
    if not cfg.parallel.sequence_parallel:
        return
    if tp == 1:
        fact = "true, but parallel.tp is 1: there are no tp ranks to split the tokens over"
        yield Problem("parallel.sequence_parallel", fact, "use false, or parallel.tp above 1")
    elif length % tp:
        fact = f"true, but parallel.tp {tp} does not divide train.seq_len {length}"
        hint = f"use false, or train.seq_len={length - length % tp or tp}"
        yield Problem("parallel.sequence_parallel", fact, hint)


def _axes_of_the_engine(cfg: RunConfig) -> Iterator[Problem]:
    kind = cfg.engine.kind
    if kind == "fsdp":
        return
    for name, default in (("shard", "auto"), ("replicate", 1)):
        if getattr(cfg.parallel, name) != default:
            fact = f"engine.kind {kind} uses all data-parallel ranks; only fsdp reads this key"
            hint = f"leave it at {default}, or set engine.kind=fsdp"
            yield Problem(f"parallel.{name}", fact, hint)


def _zero_stage(cfg: RunConfig) -> Iterator[Problem]:
    engine = cfg.engine
    if engine.kind != "deepspeed" and engine.zero_stage != _UNUSED_STAGE:
        fact = (
            f"{engine.zero_stage}, but engine.kind is {engine.kind}; only deepspeed reads this key"
        )
        yield Problem("engine.zero_stage", fact, "leave it out, or set engine.kind=deepspeed")


def _reshard(cfg: RunConfig) -> Iterator[Problem]:
    if cfg.engine.kind != "fsdp" and not cfg.engine.reshard_after_forward:
        fact = f"engine.kind {cfg.engine.kind} does not read this key; only fsdp does"
        hint = "leave it at true, or set engine.kind=fsdp"
        yield Problem("engine.reshard_after_forward", fact, hint)


def _offload(cfg: RunConfig) -> Iterator[Problem]:
    kind, stage, offload = cfg.engine.kind, cfg.engine.zero_stage, cfg.engine.offload
    match kind, offload:
        case (_, "none") | ("fsdp", "all"):
            return
        case "ddp", _:
            fact = f"{offload}, but ddp keeps the whole state on each accelerator"
            hint = "use none, engine.kind=fsdp with offload=all, or engine.kind=deepspeed"
            yield Problem("engine.offload", fact, hint)
        case "fsdp", _:
            fact = "fsdp moves weights, gradients and optimizer to the host together"
            hint = "use all, or engine.kind=deepspeed, which can move the optimizer alone"
            yield Problem("engine.offload", fact, hint)
        case "deepspeed", "optimizer" if stage == 0:
            fact = "optimizer, but zero_stage 0 keeps a whole optimizer on each accelerator"
            yield Problem("engine.offload", fact, "use none, or engine.zero_stage 1, 2 or 3")
        case "deepspeed", "all" | "nvme" if stage != 3:
            fact = f"{offload}, but zero_stage {stage} keeps whole weights on each accelerator"
            hint = "set engine.zero_stage=3" + (", or use optimizer" if stage else "")
            yield Problem("engine.offload", fact, hint)


def _precision(cfg: RunConfig) -> Iterator[Problem]:
    kind, precision, skips = cfg.engine.kind, cfg.engine.precision, cfg.optim.max_skips
    if kind == "deepspeed" and precision == "fp64":
        yield Problem("engine.precision", "deepspeed has no fp64", "use engine.kind=fsdp or ddp")
    if precision != "fp16":
        return
    if kind != "deepspeed":
        fact = f"{kind} has no fp16: it needs a loss scale, which only deepspeed has here"
        yield Problem("engine.precision", fact, "use bf16, or engine.kind=deepspeed")
    elif skips < _FP16_SKIPS:
        fact = f"{skips}, but fp16 finds its loss scale by skipping steps that overflow"
        hint = (
            f"set at least {_FP16_SKIPS}, or use engine.precision=bf16, which needs no loss scale"
        )
        yield Problem("optim.max_skips", fact, hint)


def _compile(cfg: RunConfig) -> Iterator[Problem]:
    if cfg.engine.kind == "deepspeed" and cfg.engine.zero_stage == 3 and cfg.engine.compile:
        fact = "true, but zero_stage 3 gathers weights inside the blocks, which the compiler cannot"
        hint = "set it to false, or use engine.kind=fsdp, or engine.zero_stage=2"
        yield Problem("engine.compile", fact, hint)


# Each check with all the keys that it reads.
CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("parallel.tp", "model.heads", "model.kv_heads", "model.feed_forward"), _split_over_tp),
    (("parallel.tp", "parallel.sequence_parallel", "train.seq_len"), _sequence_parallel),
    (("engine.kind", "parallel.shard", "parallel.replicate"), _axes_of_the_engine),
    (("engine.kind", "engine.zero_stage"), _zero_stage),
    (("engine.kind", "engine.reshard_after_forward"), _reshard),
    (("engine.kind", "engine.zero_stage", "engine.offload"), _offload),
    (("engine.kind", "engine.precision", "optim.max_skips"), _precision),
    (("engine.kind", "engine.zero_stage", "engine.compile"), _compile),
)
