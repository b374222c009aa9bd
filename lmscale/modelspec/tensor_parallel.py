"""Which modules tensor parallelism splits, and how. lmscale/parallel/tensor.py makes the split.

The words are Megatron's (arXiv:1909.08053, section 3), for y = x A with A [in, out]; our linear weights are
stored [out, in]:

    columns     the outputs are split: dim 0 of a stored weight, and the bias
    rows        the inputs are split and the outputs summed over ranks: dim 1 of a stored weight; every rank has
                the whole bias, which is added once, after the sum
    vocabulary  the ids are split: dim 0 of an embedding or of a head
    sequence    every rank has the whole parameter; with sequence parallelism (arXiv:2205.05198) a rank applies
                it to some of the tokens
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from lmscale.modelspec.feed_forward import FEED_FORWARDS

TpStyle = Literal["columns", "rows", "vocabulary", "sequence"]


def _feed_forward_styles() -> Iterator[tuple[str, TpStyle]]:
    for kind in FEED_FORWARDS.values():
        for name in kind.up:
            yield f"decoder.blocks.*.feed_forward.{name}", "columns"
        yield f"decoder.blocks.*.feed_forward.{kind.down}", "rows"


# Name patterns of modules; * is the number of a block. A tied head reads the embedding's weight.
TP_STYLES: Mapping[str, TpStyle] = {
    "decoder.embedding": "vocabulary",
    "decoder.positions": "sequence",
    "decoder.blocks.*.norm_attention": "sequence",
    "decoder.blocks.*.attention.q": "columns",
    "decoder.blocks.*.attention.k": "columns",
    "decoder.blocks.*.attention.v": "columns",
    "decoder.blocks.*.attention.out": "rows",
    "decoder.blocks.*.norm_feed_forward": "sequence",
    **dict(_feed_forward_styles()),
    "decoder.norm": "sequence",
    "heads.lm": "vocabulary",
}

# Name patterns of modules that take whole hidden states and whose first matrices are split by columns. Their
# input enters the tensor-parallel region once, for all of these matrices; it is left at a module split by rows.
PARALLEL_REGIONS = ("decoder.blocks.*.attention", "decoder.blocks.*.feed_forward", "heads.lm")


def tp_style(parameter: str) -> TpStyle:
    """How the module of this parameter is split. Each parameter's module matches exactly one pattern."""
    module = parameter.rpartition(".")[0]
    styles = [style for pattern, style in TP_STYLES.items() if fnmatchcase(module, pattern)]
    assert len(styles) == 1, f"{parameter} matches {len(styles)} entries of TP_STYLES"
    return styles[0]


def tp_dim(parameter: str) -> int | None:
    """The dimension of the stored parameter that is split over the tp ranks; None: each rank has all of it."""
    match tp_style(parameter):
        case "columns" | "vocabulary":
            return 0
        case "rows":
            return 1 if parameter.endswith(".weight") else None
        case "sequence":
            return None


def sums_over_tokens(parameter: str) -> bool:
    """Whether its gradient on a rank covers only that rank's tokens under sequence parallelism."""
    return tp_dim(parameter) is None
