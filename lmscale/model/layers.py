"""The one rule of internal precision: at least fp32. `.float()` is a downcast in an fp64 run.

Dropout whose mask may be a function of where an element stands, not of when a generator was asked.

Shapes: B rows, l tokens of a row that this rank holds (all L without sequence parallelism), D model width.

One layer of a stack: attention and feed-forward, each with its norm and residual.

Shapes: B rows, L tokens, D model width, F feed-forward width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lmscale.model.attention import Attention, AttentionContext
from lmscale.modelspec.spec import Architecture


def make_norm(arch: Architecture) -> nn.Module:
    """RMSNorm (arXiv:1910.07467) or LayerNorm; eps explicit: torch's RMSNorm default is the dtype's."""
    match arch.norm:
        case "rms":
            return nn.RMSNorm(arch.hidden_size, eps=arch.norm_eps)
        case "layer":
            return nn.LayerNorm(arch.hidden_size, eps=arch.norm_eps, bias=arch.bias)
        case unknown:
            raise AssertionError(f"norm {unknown!r} passed the config check")


class FeedForward(nn.Module):
    """Two matrices with an activation between, or three for SwiGLU (arXiv:2002.05202)."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.activation = arch.activation
        if arch.activation == "swiglu":
            self.gate = nn.Linear(arch.hidden_size, arch.ffn_hidden_size, bias=arch.bias)
        self.up = nn.Linear(arch.hidden_size, arch.ffn_hidden_size, bias=arch.bias)
        self.down = nn.Linear(arch.ffn_hidden_size, arch.hidden_size, bias=arch.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        up_BLF = self.up(x_BLD)
        match self.activation:
            case "swiglu":
                hidden_BLF = F.silu(self.gate(x_BLD)) * up_BLF
            case "gelu":
                hidden_BLF = F.gelu(up_BLF)
            case "gelu_tanh":
                hidden_BLF = F.gelu(up_BLF, approximate="tanh")
            case "relu":
                hidden_BLF = F.relu(up_BLF)
            case unknown:
                raise AssertionError(f"activation {unknown!r} passed the config check")
        return self.down(hidden_BLF)


class Block(nn.Module):
    """The unit of activation checkpointing, compilation and sharding.

    Dropout sits on the two residual branches, never on the attention weights: that would leave the
    flash kernels.
    """

    def __init__(self, arch: Architecture):
        super().__init__()
        self.post_norm = arch.norm_order == "post"
        self.norm_attention = make_norm(arch)
        self.attention = Attention(arch)
        self.norm_feed_forward = make_norm(arch)
        self.feed_forward = FeedForward(arch)

    def forward(self, x_BLD: Tensor, context: AttentionContext) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        if self.post_norm:
            branch_BLD = context.drop_attention(self.attention(x_BLD, context))
            x_BLD = self.norm_attention(x_BLD + branch_BLD)
            branch_BLD = context.drop_feed_forward(self.feed_forward(x_BLD))
            return self.norm_feed_forward(x_BLD + branch_BLD)
        branch_BLD = self.attention(self.norm_attention(x_BLD), context)
        x_BLD = x_BLD + context.drop_attention(branch_BLD)
        branch_BLD = self.feed_forward(self.norm_feed_forward(x_BLD))
        return x_BLD + context.drop_feed_forward(branch_BLD)
