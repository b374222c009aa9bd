"""Which cases are run: every pair of values in each CI run, every triple in `make matrix`, and what neither has."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from tests.gradients.case import VALUES, GradientCase, problem
from tests.gradients.covering import covering, uncovered

# The factors by which `problem` decides, in groups that it decides together.
_TOGETHER = (
    ("tp", "sequence_parallel"),
    ("engine", "compile"),
    ("engine", "offload"),
    ("engine", "precision"),
    ("engine", "reshard"),
    ("engine", "tp"),
)
_SALT = "2"  # the shortest arrays of the first sixteen
# Not crossed: tp 8 takes all ranks, and drawn dropout needs one rank that sees the whole batch. See EXTRA.
_APART: Mapping[str, Sequence[str]] = {"tp": ("8",), "dropout": ("drawn",)}
# Of the pairs, because the compiler takes as long as all of them. test_engine.py has them once.
_SLOW: Mapping[str, Sequence[str]] = {
    "compile": ("on",),
    "recompute": ("every", "budget"),
    "precision": ("fp16",),
}
TRIPLE_VALUES = {
    factor: tuple(value for value in values if value not in _APART.get(factor, ()))
    for factor, values in VALUES.items()
}
PAIR_VALUES = {
    factor: tuple(value for value in values if value not in _SLOW.get(factor, ()))
    for factor, values in TRIPLE_VALUES.items()
}
# What no run may have: why, and what to take instead. The words are factors of a run.
REFUSED: tuple[Mapping[str, Any], ...] = (
    {
        "factors": {"offload": "nvme"},
        "why": "DeepSpeed would have to build its async_io when it starts, against libaio (Debian: libaio-dev), "
        "and it was never held against one process",
        "nearest": "use all, with engine.kind=deepspeed and engine.zero_stage=3: memory of the host",
    },
)
# With masks that torch draws, recomputation must draw them again: the only cases in which it can go wrong.
DRAWN = "zero2 tp2 full fp32 separate gpt2 drawn unequal smallest clipped"


@cache
def pairs() -> list[GradientCase]:
    """Every two values of PAIR_VALUES that a case can have together."""
    return [*_cover(PAIR_VALUES, 2), GradientCase.named(DRAWN)]


@cache
def triples() -> list[GradientCase]:
    """Every three values of TRIPLE_VALUES, the largest tp once an engine, and drawn masks under recomputation."""
    return [*_cover(TRIPLE_VALUES, 3), *_largest_tp(), *_drawn()]


def missing(
    cases: Sequence[GradientCase], values: Mapping[str, Sequence[str]], strength: int
) -> list[dict[str, str]]:
    """Combinations that none of these cases has and some case could, by trying all."""
    return list(uncovered([case.words for case in cases], values, strength, problem))


def _cover(factors: Mapping[str, Sequence[str]], strength: int) -> list[GradientCase]:
    groups = [(keys, problem) for keys in _TOGETHER]
    found = covering(factors, strength, groups, salt=_SALT)
    return [GradientCase(**words) for words in found]


def _largest_tp() -> list[GradientCase]:
    settings = (
        "full fp32 separate llama dropout accumulated unequal",
        "sequence bf16 joined gpt2 clipped",
    )
    engines = [engine for engine in VALUES["engine"] if not problem({"engine": engine, "tp": "8"})]
    return [
        GradientCase.named(f"{engine} tp8 {settings[index % 2]} largest")
        for index, engine in enumerate(engines)
    ]


def _drawn() -> list[GradientCase]:
    names = (
        "fsdp tp1 full fp32 separate llama drawn unequal smallest",
        "ddp tp1 every fp32 joined gpt2 drawn smallest clipped",
        "zero3 tp1 selective fp32 separate mixed drawn smallest",
        "fsdp tp2 selective fp32 joined mixed drawn unequal smallest",
        "ddp tp2 budget fp32 separate llama drawn smallest",
        "zero1 tp4 full fp32 joined llama drawn smallest clipped",
        "fsdp tp4 every fp32 separate gpt2 drawn unequal smallest",
        DRAWN,
    )
    return [GradientCase.named(name) for name in names]
