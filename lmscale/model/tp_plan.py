"""What may be split over tensor-parallel ranks, in words. The split itself is made in parallel/.

The words are Megatron's (arXiv:1909.08053, section 3), for y = x A with A [in, out]; our linear weights are
stored [out, in]:

    columns     the outputs are cut: dim 0 of a stored weight, and the bias
    rows        the inputs are cut and the outputs summed over ranks: dim 1 of a stored weight; a bias is
                whole and added once, after the sum
    vocabulary  the ids are cut: dim 0 of an embedding or of a head
    sequence    whole on every rank; with sequence parallelism (arXiv:2205.05198) a rank applies it to
                some of the tokens
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

Cut = Literal["columns", "rows", "vocabulary", "sequence"]

# Modules of a LanguageModel; * is the number of a block. A tied head reads the embedding's weight.
PLAN: Mapping[str, Cut] = {
    "decoder.embedding": "vocabulary",
    "decoder.positions": "sequence",
    "decoder.blocks.*.norm_attention": "sequence",
    "decoder.blocks.*.attention.q": "columns",
    "decoder.blocks.*.attention.k": "columns",
    "decoder.blocks.*.attention.v": "columns",
    "decoder.blocks.*.attention.out": "rows",
    "decoder.blocks.*.norm_feed_forward": "sequence",
    "decoder.blocks.*.feed_forward.gate": "columns",
    "decoder.blocks.*.feed_forward.up": "columns",
    "decoder.blocks.*.feed_forward.down": "rows",
    "decoder.norm": "sequence",
    "heads.lm": "vocabulary",
}

# Modules that take whole hidden states and cut them by columns inside: their input enters the region once,
# however many matrices read it. A module cut by rows is where the region is left.
REGIONS = ("decoder.blocks.*.attention", "decoder.blocks.*.feed_forward", "heads.lm")


def cut_of(parameter: str) -> Cut:
    """How the module that owns this parameter is cut. Every parameter matches exactly one entry."""
    module = parameter.rpartition(".")[0]
    found = [cut for pattern, cut in PLAN.items() if fnmatchcase(module, pattern)]
    assert len(found) == 1, f"{parameter} matches {len(found)} entries of the plan"
    return found[0]


def cut_dim(parameter: str) -> int | None:
    """The dimension of the stored parameter that is dealt out over the tp ranks; None: whole on each."""
    match cut_of(parameter):
        case "columns" | "vocabulary":
            return 0
        case "rows":
            return 1 if parameter.endswith(".weight") else None
        case "sequence":
            return None


def sums_over_tokens(parameter: str) -> bool:
    """Whether its gradient on a rank covers only that rank's tokens under sequence parallelism."""
    return cut_dim(parameter) is None
