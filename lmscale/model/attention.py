"""torch.compile as it is used here: one graph, for each shape that comes, or an error.

torch would rather go on slowly than stop: a graph break cuts a function into pieces, and one that was
compiled for too many shapes runs uncompiled from then on. Both are errors here, since nobody reads logs.

Rotary positions (arXiv:2104.09864), in the half-split order of Llama's checkpoints.

Shapes: B rows, L tokens, N heads, H head size.

Who may look at whom, and the attention layer.

Shapes: B rows, L tokens a row, D model width, N query heads, K kv heads, H head size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lmscale.base.batch import Stream
from lmscale.base.errors import ConfigError, Problem
from lmscale.model.dropout import Dropout, at_least_fp32
from lmscale.modelspec.spec import Architecture

# Versions of a function that one run may need, each compiled for seconds: a mode of checkpointing x training, a
# short last micro-batch, evaluation, samples, a batch that DDP begins with.
VERSIONS = 32


def one_graph(*, problem: Callable[[str], Problem]) -> Callable[..., Any]:
    """call(function, *args, **kwargs) -> what the function gives, compiled at the first call with each shape.

    All functions that one `call` is given share its versions, and no other compiled code of the process does.
    problem: the message for a fact, which needs a subject. The call raises ConfigError with it when there is no
    compiler, or the function cannot be compiled as one graph.
    """
    # torch counts versions by code object.
    compiled = torch.compile(
        FunctionType(_call.__code__.replace(), globals()), fullgraph=True, dynamic=False
    )
    return partial(_explained, compiled, problem)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _explained(
    compiled: Callable[..., Any], problem: Callable[[str], Problem], *args: Any, **kwargs: Any
) -> Any:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        with _settings(VERSIONS):
            return compiled(*args, **kwargs)
    except FailOnRecompileLimitHit as error:
        raise ConfigError(
            [problem(f"met more than {VERSIONS} different shapes of input")]
        ) from error
    except TorchDynamoException as error:
        raise ConfigError([problem(f"could not be compiled: {_first(error)}")]) from error


@cache
def _settings(versions: int) -> AbstractContextManager[None]:
    """One patch for all calls: in torch 2.13 each that is made leaves 220 bytes behind for ever."""
    from torch._dynamo import config  # here: it takes two seconds, which only compiled runs pay

    # DDP would cut graphs at the borders of its buckets. A block is small enough to overlap with.
    patch = config.patch(optimize_ddp=False, recompile_limit=versions)
    return cast(AbstractContextManager[None], patch)


def _first(error: BaseException) -> str:
    """The first words of a message of many lines that say what happened."""
    lines = (line.strip() for line in str(error).splitlines())
    said = (line for line in lines if line and not line.endswith("raised:"))
    return next(said, type(error).__name__)


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


class AttentionContext:
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
    ) -> "AttentionContext":
        """Mask and angles of this batch, for a model that computes in `dtype`."""
        rotation = None
        if arch.positions == "rotary":
            rotation = Rotation(
                stream.positions_BL, head_dim=arch.head_dim, theta=arch.rope_theta, dtype=dtype
            )
        return cls(causal_mask(stream.documents_BL, arch.head_dim, dtype), rotation, dropout)

    def at_layer(self, index: int) -> "AttentionContext":
        """What the block of this index is given: the same, with dropout sites of its own."""
        if not self.dropout.exact:
            return self
        context = AttentionContext(self.mask, self.rotation, self.dropout)
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
        wide, narrow = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q = nn.Linear(arch.hidden_size, wide, bias=arch.bias)
        self.k = nn.Linear(arch.hidden_size, narrow, bias=arch.bias)
        self.v = nn.Linear(arch.hidden_size, narrow, bias=arch.bias)
        self.out = nn.Linear(wide, arch.hidden_size, bias=arch.bias)

    def forward(self, x_BLD: Tensor, context: AttentionContext) -> Tensor:
        """[B, L, D] -> [B, L, D]. The number of heads is read off q, k, v, not off the config."""
        split = (-1, self.head_dim)
        q_BLNH = self.q(x_BLD).unflatten(-1, split)
        k_BLKH = self.k(x_BLD).unflatten(-1, split)
        v_BLKH = self.v(x_BLD).unflatten(-1, split)
        if context.rotation is not None:
            q_BLNH, k_BLKH = context.rotation(q_BLNH), context.rotation(k_BLKH)
        y_BLNH = attend(q_BLNH, k_BLKH, v_BLKH, context.mask)
        return self.out(y_BLNH.flatten(-2))
