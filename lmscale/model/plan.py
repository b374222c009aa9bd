"""What may be split over tensor-parallel ranks, in words. The split itself is made in parallel/.

The words are Megatron's, for y = x A with A [in, out]; our linear weights are stored [out, in]:

    columns   the outputs are cut: dim 0 of a stored weight, and the bias
    rows      the inputs are cut and the outputs summed over ranks: dim 1 of a stored weight; a bias is
              whole and added once. A table's inputs are its ids: dim 0 of an embedding
    sequence  whole on every rank; with sequence parallelism (arXiv:2205.05198) a rank applies it to
              some of the tokens, so its gradient is a sum over ranks
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

Split = Literal["rows", "columns", "sequence"]

# Modules of a LanguageModel; * is the number of a block. A tied head reads the embedding's weight,
# which both entries cut along the vocabulary.
PLAN: Mapping[str, Split] = {
    "decoder.embedding": "rows",
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
    "heads.lm": "columns",
}


def split_of(parameter: str) -> Split:
    """How the module that owns this parameter is cut. Every parameter matches exactly one entry."""
    module = parameter.rpartition(".")[0]
    found = [split for pattern, split in PLAN.items() if fnmatchcase(module, pattern)]
    assert len(found) == 1, f"{parameter} matches {len(found)} entries of the plan"
    return found[0]
