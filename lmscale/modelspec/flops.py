"""What a token costs, and how many parameters a model has: arithmetic only, nothing is built.

Letters: N query heads, H head size, L tokens a row.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from torch import nn

from lmscale.modelspec.spec import Architecture

if TYPE_CHECKING:
    from lmscale.config.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Parameters of a built model."""

    total: int
    trainable: int
    non_embedding: int  # without token and position tables; an untied head counts


def flops_per_token(
    cfg: Union["ModelConfig", Architecture], *, seq_len: int, vocab_size: int, causal: bool
) -> float:
    """Floating point operations of training on one token: forward and backward, no recomputation.

        6 * (matrix parameters a token meets) + 12 * layers * N * H * L

    A multiply-add counts 2, and the backward twice the forward. PaLM (arXiv:2204.02311), appendix
    B; there "6 N" counts all parameters, here only those of matrix products: an embedding lookup,
    norms and biases cost next to nothing. The head counts whether tied or not, over the real
    vocabulary: products with its padding are of no use.

    causal=False: attention as in PaLM, every token with all L keys; the convention of published
    MFU numbers. causal=True: only the keys a causal kernel needs, (L + 1) / 2 on average. Documents
    packed into one row make real attention cheaper still; neither convention counts that.
    """
    arch = Architecture.of(cfg, vocab_size=vocab_size, max_positions=seq_len)
    keys = (seq_len + 1) / 2 if causal else seq_len
    scores = arch.num_layers * arch.num_heads * arch.head_dim * keys
    return 6 * matrix_parameters(arch) + 12 * scores


def matrix_parameters(arch: Architecture) -> int:
    """Elements of the matrices that every token is multiplied with, head included."""
    attention = 2 * arch.hidden_size * arch.head_dim * (arch.num_heads + arch.num_kv_heads)
    matrices = 3 if arch.activation == "swiglu" else 2
    feed_forward = matrices * arch.hidden_size * arch.ffn_hidden_size
    return arch.num_layers * (attention + feed_forward) + arch.hidden_size * arch.vocab_size


def num_parameters(model: nn.Module) -> ModelCosts:
    """Count a model's parameters, by global shape where they are sharded."""
    sizes = {name: parameter.shape.numel() for name, parameter in model.named_parameters()}
    tables = ("decoder.embedding.weight", "decoder.positions.weight")
    return ModelCosts(
        total=sum(sizes.values()),
        trainable=sum(p.shape.numel() for p in model.parameters() if p.requires_grad),
        non_embedding=sum(size for name, size in sizes.items() if name not in tables),
    )
