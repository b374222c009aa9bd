"""One layer of a stack: attention and feed-forward, each with its norm and a residual connection.

Shapes: B rows, L tokens, D hidden size, F hidden size of the feed-forward.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lmscale.model.attention import Attention, BlockContext
from lmscale.modelspec.spec import BlockSpec, FeedForwardSpec, NormSpec


def make_norm(spec: NormSpec, size: int) -> nn.Module:
    """RMSNorm (arXiv:1910.07467) or LayerNorm; eps explicit: torch's RMSNorm default is the dtype's."""
    match spec.kind:
        case "rms":
            return nn.RMSNorm(size, eps=spec.eps)
        case "layer":
            return nn.LayerNorm(size, eps=spec.eps, bias=spec.bias)
        case unknown:
            raise AssertionError(f"norm {unknown!r} passed the config check")


class FeedForward(nn.Module):
    """Matrices [F, D], what a subclass computes from their results, and the matrix `down`, [D, F].

    The names of the matrices are those of the kind in lmscale/modelspec/feed_forward.py. Under tensor
    parallelism `forward` of this module and of `down` is replaced on the instance, and F is this rank's part.
    """

    up: nn.Linear

    def __init__(self, spec: FeedForwardSpec, hidden_size: int):
        super().__init__()
        for name in spec.properties.up:
            self.add_module(name, nn.Linear(hidden_size, spec.hidden_size, bias=spec.bias))
        self.down = nn.Linear(spec.hidden_size, hidden_size, bias=spec.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.down(self.hidden(x_BLD))

    def hidden(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, F]."""
        raise NotImplementedError


class SwiGLU(FeedForward):
    """silu(gate) * up (arXiv:2002.05202)."""

    gate: nn.Linear

    def hidden(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, F]."""
        up_BLF = self.up(x_BLD)
        return F.silu(self.gate(x_BLD)) * up_BLF


class GELU(FeedForward):
    """The exact GELU (erf), which BERT, BART and Whisper have (arXiv:1606.08415)."""

    def hidden(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, F]."""
        return F.gelu(self.up(x_BLD))


class TanhGELU(FeedForward):
    """GPT-2's approximation of the GELU."""

    def hidden(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, F]."""
        return F.gelu(self.up(x_BLD), approximate="tanh")


class ReLU(FeedForward):
    """max(up, 0)."""

    def hidden(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, F]."""
        return F.relu(self.up(x_BLD))


# One class for each entry of FEED_FORWARDS in lmscale/modelspec/feed_forward.py.
FEED_FORWARD_CLASSES: Mapping[str, type[FeedForward]] = {
    "swiglu": SwiGLU,
    "gelu": GELU,
    "gelu_tanh": TanhGELU,
    "relu": ReLU,
}


class Block(nn.Module):
    """The unit of activation checkpointing, compilation and sharding.

    Dropout is applied to the two residual branches, never to the attention weights: flash kernels do not
    support that. Activation checkpointing and compilation replace `forward` on the instance.
    """

    def __init__(self, spec: BlockSpec, hidden_size: int):
        super().__init__()
        self.post_norm = spec.norm_order == "post"
        self.norm_attention = make_norm(spec.norm, hidden_size)
        self.attention = Attention(spec.attention, hidden_size)
        self.norm_feed_forward = make_norm(spec.norm, hidden_size)
        feed_forward = FEED_FORWARD_CLASSES[spec.feed_forward.kind]
        self.feed_forward = feed_forward(spec.feed_forward, hidden_size)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        if self.post_norm:
            branch_BLD = context.attention_dropout(self.attention(x_BLD, context))
            x_BLD = self.norm_attention(x_BLD + branch_BLD)
            branch_BLD = context.feed_forward_dropout(self.feed_forward(x_BLD))
            return self.norm_feed_forward(x_BLD + branch_BLD)
        branch_BLD = self.attention(self.norm_attention(x_BLD), context)
        x_BLD = x_BLD + context.attention_dropout(branch_BLD)
        branch_BLD = self.feed_forward(self.norm_feed_forward(x_BLD))
        return x_BLD + context.feed_forward_dropout(branch_BLD)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace what a module computes, on the instance. Its hooks stay around it, its parameters keep their names.

    A wrapping module would put a prefix before every parameter's name, and checkpoints are made of names.
    """
    module.forward = forward
