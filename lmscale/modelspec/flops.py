"""FLOPs of training on one token, by formula.

Letters: N query heads, H head size, L tokens of a row.
"""

from math import prod

from lmscale.modelspec.parameters import matrices
from lmscale.modelspec.spec import ModelSpec, StackSpec


def flops_per_token(spec: ModelSpec, *, seq_len: int, causal: bool) -> float:
    """Floating point operations of training on one token: forward and backward, no recomputation.

        6 * (matrix parameters that a token is multiplied with) + 12 * layers * N * H * L

    A multiply-add counts 2, and the backward twice the forward. PaLM (arXiv:2204.02311), appendix
    B; there "6 N" counts all parameters, here only those of matrix products: an embedding lookup,
    norms and biases cost next to nothing. The head counts whether tied or not, over the real
    vocabulary: products with its padding are of no use.

    causal=False: attention as in PaLM, every token with all L keys; the convention of published
    MFU numbers. causal=True: only the keys a causal kernel needs, (L + 1) / 2 on average. Documents
    packed into one row make real attention cheaper still; neither convention counts that.
    """
    keys = (seq_len + 1) / 2 if causal else seq_len
    scores = sum(
        stack.num_layers * stack.block.attention.query_size * keys for stack in spec.stacks
    )
    return 6 * matrix_parameters(spec) + 12 * scores


def matrix_parameters(spec: ModelSpec) -> int:
    """Elements of the matrices that every token is multiplied with, heads included."""
    heads = (spec.stack(head.stack) for head in spec.heads)
    return sum(_in_blocks(stack) for stack in spec.stacks) + sum(
        stack.hidden_size * stack.vocab_size for stack in heads
    )


def _in_blocks(stack: StackSpec) -> int:
    block = sum(
        prod(shape)
        for _, branch in stack.block.branches
        for _, *shape in matrices(stack.hidden_size, branch)
    )
    return stack.num_layers * block
