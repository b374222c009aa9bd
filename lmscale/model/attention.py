"""Who may look at whom, and the attention layer.

Shapes: B rows, L tokens a row, D model width, N query heads, K kv heads, H head size.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lmscale.batch import Stream
from lmscale.errors import Problem
from lmscale.model.architecture import Architecture
from lmscale.model.dropout import Dropout
from lmscale.model.one_graph import one_graph
from lmscale.model.rotary import Rotation

# None: each row is one document, plain causal. Tensor: True where a query (row) may see a key
# (column), on CPUs. BlockMask: FlexAttention, on CUDA.
Mask = Tensor | BlockMask | None


class Context:
    """What every layer needs to know of a batch; built once per forward, read by all blocks.

    Deliberately not a pytree: FSDP can cast the tensors it finds among a block's inputs, and the
    rotary angles must stay in fp32.
    """

    def __init__(self, mask: Mask, rotation: Rotation | None, dropout: Dropout):
        self.mask = mask
        self.rotation = rotation
        self.dropout = dropout
        # One for each branch of a block: a block that is told which layer it is would be compiled for each.
        self.drop_attention = self.drop_feed_forward = dropout

    @classmethod
    def of(
        cls, stream: Stream[Tensor], arch: Architecture, dtype: torch.dtype, dropout: Dropout
    ) -> "Context":
        """Mask and angles of this batch, for a model that computes in `dtype`."""
        rotation = None
        if arch.positions == "rotary":
            rotation = Rotation(
                stream.positions_BL, head_dim=arch.head_dim, theta=arch.rope_theta, dtype=dtype
            )
        return cls(causal_mask(stream.documents_BL, arch.head_dim, dtype), rotation, dropout)

    def at_layer(self, index: int) -> "Context":
        """What the block of this index is given: the same, with dropout sites of its own."""
        if not self.dropout.exact:
            return self
        context = Context(self.mask, self.rotation, self.dropout)
        context.drop_attention = self.dropout.at(2 * index + 1)
        context.drop_feed_forward = self.dropout.at(2 * index + 2)
        return context


def causal_mask(documents_BL: Tensor | None, head_dim: int, dtype: torch.dtype) -> Mask:
    """Causal, and only within a document.

    Padding (-1) is a document like any other here: it sees itself and is seen by nobody else, so no
    row of the softmax is empty and no NaN can arise.
    """
    if documents_BL is None:
        return None
    # What FlexAttention's kernel cannot take goes the way of a CPU: right, and slow.
    if documents_BL.is_cuda and dtype != torch.float64 and head_dim >= 16:
        # Uncompiled, making it would hold B x L x L booleans: 1 GB for four rows of 16384 tokens.
        return block_mask(documents_BL, on_device(create_block_mask))
    length = documents_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=documents_BL.device).tril()
    same_BLL = documents_BL[:, :, None] == documents_BL[:, None, :]
    return (same_BLL & causal_LL)[:, None]


def block_mask(
    documents_BL: Tensor, make: Callable[..., BlockMask] = create_block_mask
) -> BlockMask:
    """The same rule for FlexAttention, which skips the blocks of keys that nobody in a block sees."""

    def visible(b: Tensor, _head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (documents_BL[b, q] == documents_BL[b, kv]) & (q >= kv)

    rows, length = documents_BL.shape
    return make(visible, rows, None, length, length, device=documents_BL.device.type)


def attend(q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, mask: Mask) -> Tensor:
    """Softmax attention, [B, L, N, H]. Without a mask flash kernels apply on every device."""
    q_BNLH, k_BKLH, v_BKLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
    grouped = q_BNLH.shape[1] != k_BKLH.shape[1]
    if mask is None or isinstance(mask, Tensor):
        if grouped and q_BLNH.is_cuda and (mask is not None or q_BLNH.dtype == torch.float32):
            k_BKLH, v_BKLH = (for_each_query(x, q_BNLH.shape[1]) for x in (k_BKLH, v_BKLH))
            grouped = False
        y_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    else:
        flex: Callable[..., Any] = flex_attention
        if not torch.compiler.is_compiling():  # it would hold all scores
            flex = on_device(flex_attention)
        y_BNLH = flex(q_BNLH, k_BKLH, v_BKLH, block_mask=mask, enable_gqa=grouped)
    return y_BNLH.transpose(1, 2)


def for_each_query(x_BKLH: Tensor, heads: int) -> Tensor:
    """Keys or values repeated for the query heads that share them, [B, N, L, H].

    Only flash kernels know groups, and they take neither fp32 nor a mask; what is left holds all scores.
    """
    return x_BKLH.repeat_interleave(heads // x_BKLH.shape[1], dim=1)


@cache
def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel of the function, for blocks that are not compiled themselves.

    Made at first use: torch.compile loads its compiler, two seconds that no CPU run need pay.
    """
    return partial(one_graph(problem=_no_kernel), function)


def _no_kernel(fact: str) -> Problem:
    hint = "set data.documents=joined, or, where a compiler is missing, give the machine one (Triton and a C compiler)"
    return Problem("data.documents", f"attention within documents {fact}", hint)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (arXiv:2305.13245)."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.head_dim = arch.head_dim
        wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        self.q = nn.Linear(arch.width, wide, bias=arch.biases)
        self.k = nn.Linear(arch.width, narrow, bias=arch.biases)
        self.v = nn.Linear(arch.width, narrow, bias=arch.biases)
        self.out = nn.Linear(wide, arch.width, bias=arch.biases)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """[B, L, D] -> [B, L, D]. The number of heads is read off q, k, v, not off the config."""
        split = (-1, self.head_dim)
        q_BLNH = self.q(x_BLD).unflatten(-1, split)
        k_BLKH = self.k(x_BLD).unflatten(-1, split)
        v_BLKH = self.v(x_BLD).unflatten(-1, split)
        if context.rotation is not None:
            q_BLNH, k_BLKH = context.rotation(q_BLNH), context.rotation(k_BLKH)
        y_BLNH = attend(q_BLNH, k_BLKH, v_BLKH, context.mask)
        return self.out(y_BLNH.flatten(-2))
