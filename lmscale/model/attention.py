"""Attention: which tokens attend to which, rotary positions (arXiv:2104.09864), and the attention layer.

Rotary positions are in the half-split order of Llama's checkpoints.

Shapes: B rows, L tokens per row, D hidden size, N query heads, K kv heads, H head size.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lmscale.base.batch import Stream
from lmscale.base.errors import Problem
from lmscale.model.dropout import Dropout
from lmscale.model.kernels import at_least_fp32, one_graph
from lmscale.modelspec.spec import AttentionSpec, StackSpec


class Rotation:
    """Cosines and signed sines of one batch's positions, shared by all layers."""

    def __init__(self, positions_BL: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype):
        wide = at_least_fp32(dtype)
        even_H2 = torch.arange(0, head_dim, 2, device=positions_BL.device, dtype=wide)
        angles_BL1H2 = positions_BL.to(wide)[..., None, None] * theta ** (-even_H2 / head_dim)
        cos, sin = angles_BL1H2.cos(), angles_BL1H2.sin()
        self.cos_BL1H = torch.cat([cos, cos], -1)
        self.sin_BL1H = torch.cat([-sin, sin], -1)

    def __call__(self, x_BLNH: Tensor) -> Tensor:
        """Rotate each head by its token's position; angles stay in fp32 under a bf16 model."""
        swapped_BLNH = x_BLNH.roll(x_BLNH.shape[-1] // 2, -1)
        # roll + addcmul: 1.3 ms where the textbook's chunk and cat takes 2.1 (16 x 256 x 128, CPU).
        y_BLNH = torch.addcmul(x_BLNH * self.cos_BL1H, swapped_BLNH, self.sin_BL1H)
        return y_BLNH.to(x_BLNH.dtype)


# None: each row is one document, plain causal. Tensor: True where a query (row) may see a key
# (column), on CPUs. BlockMask: FlexAttention, on CUDA.
Mask = Tensor | BlockMask | None


class BlockContext:
    """What every block reads of a batch besides its input; built once per forward.

    Deliberately not a pytree and not a dataclass: FSDP can cast the tensors that it finds among a block's
    inputs, and the rotary angles must stay in fp32.
    """

    def __init__(
        self,
        mask: Mask,
        rotation: Rotation | None,
        *,
        attention_dropout: Dropout,
        feed_forward_dropout: Dropout,
    ):
        self.mask = mask
        self.rotation = rotation
        self.attention_dropout = attention_dropout
        self.feed_forward_dropout = feed_forward_dropout

    @classmethod
    def of(
        cls, stream: Stream[Tensor], stack: StackSpec, dtype: torch.dtype, dropout: Dropout
    ) -> "BlockContext":
        """Mask and angles of this batch, for a model that computes in `dtype`. dropout: of the embedding."""
        rotation, head_dim = None, stack.block.attention.head_dim
        if stack.positions == "rotary":
            rotation = Rotation(
                stream.positions_BL, head_dim=head_dim, theta=stack.rope_theta, dtype=dtype
            )
        return cls(
            causal_mask(stream.documents_BL, head_dim, dtype),
            rotation,
            attention_dropout=dropout,
            feed_forward_dropout=dropout,
        )

    def for_block(self, index: int) -> "BlockContext":
        """The context of one block, whose branches have dropout sites of their own.

        The index is not passed to the block itself: torch.compile would make it a constant and compile every
        block again. The sites are tensors.
        """
        if not self.attention_dropout.exact:
            return self
        return BlockContext(
            self.mask,
            self.rotation,
            attention_dropout=self.attention_dropout.at_site(2 * index + 1),
            feed_forward_dropout=self.feed_forward_dropout.at_site(2 * index + 2),
        )


def causal_mask(documents_BL: Tensor | None, head_dim: int, dtype: torch.dtype) -> Mask:
    """Causal attention, and only within a document.

    Padding (-1) is a document like any other here: it attends to itself only, so no row of the softmax is
    empty and no NaN can arise.
    """
    if documents_BL is None:
        return None
    # What FlexAttention's kernel does not support is computed as on a CPU: correct, and slow.
    if documents_BL.is_cuda and dtype != torch.float64 and head_dim >= 16:
        # Uncompiled, building the mask would need B x L x L booleans: 1 GB for four rows of 16384 tokens.
        return block_mask(documents_BL, on_device(create_block_mask))
    length = documents_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=documents_BL.device).tril()
    same_BLL = documents_BL[:, :, None] == documents_BL[:, None, :]
    return (same_BLL & causal_LL)[:, None]


def block_mask(
    documents_BL: Tensor, make: Callable[..., BlockMask] = create_block_mask
) -> BlockMask:
    """The same rule for FlexAttention, which skips blocks of keys that no query of a block attends to."""

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
        if not torch.compiler.is_compiling():  # uncompiled, it would store all scores
            flex = on_device(flex_attention)
        y_BNLH = flex(q_BNLH, k_BKLH, v_BKLH, block_mask=mask, enable_gqa=grouped)
    return y_BNLH.transpose(1, 2)


def for_each_query(x_BKLH: Tensor, heads: int) -> Tensor:
    """Keys or values repeated for the query heads that share them, [B, N, L, H].

    Only flash kernels support groups, and they take neither fp32 nor a mask. The other kernels would store all
    scores of grouped heads.
    """
    return x_BKLH.repeat_interleave(heads // x_BKLH.shape[1], dim=1)


@cache
def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled kernel of the function, for blocks that are not compiled themselves.

    Created at first use: torch.compile loads its compiler, which takes two seconds that a CPU run need not pay.
    """
    return partial(one_graph(problem=_no_kernel), function)


def _no_kernel(fact: str) -> Problem:
    hint = "set data.documents=joined, or, where a compiler is missing, install one (Triton and a C compiler)"
    return Problem("data.documents", f"attention within documents {fact}", hint)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (arXiv:2305.13245).

    Under tensor parallelism `forward` of this module and of `out` is replaced on the instance, and q, k and v
    have fewer heads (lmscale/parallel/tensor.py).
    """

    def __init__(self, spec: AttentionSpec, hidden_size: int):
        super().__init__()
        self.head_dim = spec.head_dim
        self.q = nn.Linear(hidden_size, spec.query_size, bias=spec.bias)
        self.k = nn.Linear(hidden_size, spec.kv_size, bias=spec.bias)
        self.v = nn.Linear(hidden_size, spec.kv_size, bias=spec.bias)
        self.out = nn.Linear(spec.query_size, hidden_size, bias=spec.bias)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """[B, L, D] -> [B, L, D]. The number of heads follows from the sizes of q, k and v."""
        heads = (-1, self.head_dim)
        q_BLNH = self.q(x_BLD).unflatten(-1, heads)
        k_BLKH = self.k(x_BLD).unflatten(-1, heads)
        v_BLKH = self.v(x_BLD).unflatten(-1, heads)
        if context.rotation is not None:
            q_BLNH, k_BLKH = context.rotation(q_BLNH), context.rotation(k_BLKH)
        y_BLNH = attend(q_BLNH, k_BLKH, v_BLKH, context.mask)
        return self.out(y_BLNH.flatten(-2))
