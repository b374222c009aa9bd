"""The factors of a run: the few words by which the table of proven combinations knows it. Pure, no torch.

The differential matrix (tools/gradient_matrix.py) runs combinations of these words against one process; proven.py
asks whether the words of a run were among them.
"""

from collections.abc import Mapping

from lmscale.config.run import RunConfig
from lmscale.config.sections import ModelConfig

# What a run file decides.
FACTORS: Mapping[str, tuple[str, ...]] = {
    "engine": ("ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3"),
    "tp": ("1", "2", "4", "8"),
    "sequence_parallel": ("off", "on"),
    "recompute": ("none", "full", "selective", "every", "budget"),
    "documents": ("separate", "joined"),
    "precision": ("fp32", "bf16", "fp64", "fp16"),
    "style": ("llama", "gpt2", "mixed"),
    "dropout": ("off", "on"),
    "offload": ("none", "optimizer", "all", "nvme"),
    "compile": ("off", "on"),
    "reshard": ("on", "off"),
}
# What a run leaves open, because a restart may change it: each value of these must be proven.
OPEN: Mapping[str, tuple[str, ...]] = {
    "accumulation": ("1", "3"),  # micro-batches of a step; the last of three is short
    "targets": ("equal", "unequal"),  # over the data-parallel ranks
    "world": ("smallest", "largest"),  # legal number of ranks among 1, 2, 4, 8
}
# The keys that decide a factor, the first of them the one to name.
KEYS: Mapping[str, tuple[str, ...]] = {
    "engine": ("engine.kind", "engine.zero_stage", "parallel.replicate"),
    "tp": ("parallel.tp",),
    "sequence_parallel": ("parallel.sequence_parallel",),
    "recompute": ("engine.activation_checkpointing",),
    "documents": ("data.documents",),
    "precision": ("engine.precision",),
    "style": (
        *("model.norm", "model.norm_place", "model.positions"),
        *("model.activation", "model.biases", "model.tied"),
    ),
    "dropout": ("model.dropout",),
    "offload": ("engine.offload",),
    "compile": ("engine.compile",),
    "reshard": ("engine.reshard_after_forward",),
}
STYLES: Mapping[str, Mapping[str, object]] = {
    "llama": {
        "norm": "rms",
        "norm_place": "pre",
        "positions": "rotary",
        "activation": "swiglu",
        "biases": False,
        "tied": False,
    },
    "gpt2": {
        "norm": "layer",
        "norm_place": "pre",
        "positions": "learned",
        "activation": "gelu_tanh",
        "biases": True,
        "tied": True,
    },
}
_LARGEST_TP = 8


def factors(cfg: RunConfig) -> dict[str, str]:
    """The words of a run: one of FACTORS for each. A tp above the tested sizes counts as the largest of them."""
    engine, parallel = cfg.engine, cfg.parallel
    return {
        "engine": _engine(cfg),
        "tp": str(min(parallel.tp, _LARGEST_TP)),
        "sequence_parallel": _on(parallel.sequence_parallel),
        "recompute": engine.activation_checkpointing.partition(":")[0],
        "documents": cfg.data.documents,
        "precision": engine.precision,
        "style": style(cfg.model),
        "dropout": _on(cfg.model.dropout > 0),
        "offload": engine.offload,
        "compile": _on(engine.compile),
        "reshard": _on(engine.reshard_after_forward),
    }


def style(model: ModelConfig) -> str:
    """llama and gpt2 are these models exactly; every other assembly of the parts is mixed."""
    for name, parts in STYLES.items():
        if all(getattr(model, key) == value for key, value in parts.items()):
            return name
    return "mixed"


def clash(words: Mapping[str, str]) -> str | None:
    """Why no run can have these words together; None where one can. Words that are missing are not looked at."""
    engine, tp = words.get("engine", ""), words.get("tp")
    zero = engine.startswith("zero")
    allowed = _OFFLOADS.get(engine)
    offload, precision = words.get("offload", "none"), words.get("precision")
    if tp == "1" and words.get("sequence_parallel") == "on":
        return "sequence_parallel needs tp above 1"
    if allowed is not None and offload not in allowed:
        return f"{engine} cannot offload {offload}"
    if engine and precision == "fp16" and not zero:
        return "only deepspeed has fp16"
    if zero and precision == "fp64":
        return "deepspeed has no fp64"
    if words.get("reshard") == "off" and engine not in ("", "fsdp", "hsdp"):
        return f"{engine} does not read reshard_after_forward"
    if engine == "zero3" and words.get("compile") == "on":
        return "zero3 gathers weights inside the blocks, where the compiler would have to break"
    return None


_OFFLOADS: Mapping[str, tuple[str, ...]] = {
    "ddp": ("none",),
    "fsdp": ("none", "all"),
    "hsdp": ("none", "all"),
    "zero0": ("none",),
    "zero1": ("none", "optimizer"),
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "all", "nvme"),
}


def _engine(cfg: RunConfig) -> str:
    match cfg.engine.kind:
        case "deepspeed":
            return f"zero{cfg.engine.zero_stage}"
        case "fsdp" if cfg.parallel.replicate > 1:
            return "hsdp"
    return cfg.engine.kind


def _on(value: bool) -> str:
    return "on" if value else "off"
