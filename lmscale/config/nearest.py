"""The nearest combination of factors that is proven: a search over a few changes, the mildest first."""

from collections.abc import Callable, Mapping
from itertools import combinations, product

# What may take the place of a value, the nearest first: no more memory of the accelerator where that is possible,
# and nothing that a user would have to learn first. tp only falls: a smaller power of two divides what a larger did.
_TRY: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "recompute": {
        "none": ("selective", "full", "every"),
        "full": ("every", "selective", "none"),
        "selective": ("full", "every", "none"),
        "every": ("full", "selective", "none"),
        "budget": ("selective", "full", "every", "none"),
    },
    "compile": {"on": ("off",)},
    "offload": {
        "optimizer": ("none",),
        "all": ("optimizer", "none"),
        "nvme": ("all", "optimizer", "none"),
    },
    "reshard": {"off": ("on",)},
    "sequence_parallel": {"on": ("off",), "off": ("on",)},
    "tp": {"8": ("4", "2", "1"), "4": ("2", "1"), "2": ("1",)},
    "engine": {
        "ddp": ("fsdp", "zero1", "zero2"),
        "fsdp": ("zero3", "zero2", "ddp"),
        "hsdp": ("fsdp", "zero3", "zero2"),
        "zero0": ("zero1", "ddp", "zero2", "fsdp"),
        "zero1": ("zero2", "zero3", "fsdp"),
        "zero2": ("zero1", "zero3", "fsdp"),
        "zero3": ("fsdp", "zero2", "zero1"),
    },
    "precision": {
        "fp32": ("bf16",),
        "bf16": ("fp32",),
        "fp64": ("fp32",),
        "fp16": ("bf16", "fp32"),
    },
    "documents": {"joined": ("separate",), "separate": ("joined",)},
    "dropout": {"on": ("off",)},
    "style": {"mixed": ("llama", "gpt2"), "gpt2": ("llama",), "llama": ("gpt2",)},
}
_HEAVY = ("tp", "engine", "precision")
MODEL = ("documents", "dropout", "style")  # another run: nobody changes a model to please a table
_MOST_CHANGES = 3


def _weight(names: tuple[str, ...]) -> tuple[int, int, int]:
    """Of a set of changes: those of the model first, then those of engine, tp and precision, then all."""
    return sum(n in MODEL for n in names), sum(n in _HEAVY for n in names), len(names)


_SETS = sorted(
    (names for size in range(1, _MOST_CHANGES + 1) for names in combinations(_TRY, size)),
    key=_weight,
)


def nearest(
    words: Mapping[str, str], proves: Callable[[Mapping[str, str]], bool]
) -> dict[str, str] | None:
    """The fewest and mildest changes that lead to a proven combination: {factor: new value}; None: none near."""
    for names in _SETS:
        for values in product(*(_TRY[name].get(words[name], ()) for name in names)):
            changes = dict(zip(names, values, strict=True))
            if proves({**words, **changes}):
                return changes
    return None
