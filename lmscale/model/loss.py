"""Cross entropy of a large vocabulary, as a sum, without ever storing all logits.

Shapes: T targets (all tokens of the batch), C tokens of one chunk, D hidden size, V vocabulary,
P rows that are stored for it: padded.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmscale.base.batch import Sums
from lmscale.model.kernels import at_least_fp32

# Logits of one chunk: 16 MiB of fp32 stay near the cache of a CPU; a GPU is efficient at large products.
_CHUNK_LOGITS = {"cpu": 1 << 22}
_CHUNK_LOGITS_ACCELERATOR = 1 << 28
_CHUNK_MIN_TOKENS = 128

# (logits_CV, targets_C, weights_C) -> weighted loss of each token; overwrites the logits with their gradient.
ChunkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunk_loss(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor) -> Tensor:
    """Weighted loss of each token, in nats; overwrites the logits with d(sum of losses)/d(logits)."""
    rows_C = torch.arange(len(targets_C), device=targets_C.device)
    target_logit_C = logits_CV[rows_C, targets_C]
    largest_C = logits_CV.amax(1)
    total_C = logits_CV.sub_(largest_C[:, None]).exp_().sum(1)
    nats_C = total_C.log() + largest_C - target_logit_C
    logits_CV.mul_((weights_C / total_C)[:, None])
    logits_CV[rows_C, targets_C] -= weights_C
    return nats_C * weights_C


def cross_entropy(
    hidden_TD: Tensor,
    weight_PD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    *,
    vocab_size: int | None = None,
    token_losses: ChunkLoss = chunk_loss,
) -> Sums[Tensor]:
    """Sum over tokens of weight * loss, in nats, and the sum of weights, both in fp64.

    fp64 because these sums are added over micro-batches and ranks and must not depend on the split;
    it costs one scalar. A target whose weight is 0 may be any number.

    vocab_size: number of rows that are tokens (None: all); later rows are padding, whose gradient is zero.
    token_losses: computes losses and gradient of a chunk; another one where weight_PD is a part of the vocabulary.
    """
    targets_T = targets_T.masked_fill(weights_T == 0, 0)
    real = len(weight_PD) if vocab_size is None else vocab_size
    loss = _ChunkedCrossEntropy.apply(
        hidden_TD, weight_PD, targets_T, weights_T, token_losses, real
    )
    return Sums(loss, weights_T.sum(dtype=torch.float64))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Head, softmax, loss and their gradients in one pass over chunks of tokens.

    The loss is a scalar, so its gradient is known up to a factor as soon as a chunk's logits are:
    they turn into their own gradient in place, three matrix products in all. Against
    F.cross_entropy(F.linear(...)) on a CPU (T 4096, D 128, V 4096): 190 ms instead of 299, and one
    chunk of logits in memory instead of four times T x V.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_PD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        token_losses: ChunkLoss,
        vocab_size: int,
    ) -> Tensor:
        compute = _compute_dtype(hidden_TD)
        hidden_TD, weight_PD = hidden_TD.to(compute), weight_PD.to(compute)
        chunk_size = _chunk_size(hidden_TD.device.type, len(weight_PD))
        wide = at_least_fp32(compute)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        # Accumulated over chunks, so in fp32 where the products are bf16.
        grad_PD = torch.zeros_like(weight_PD, dtype=wide) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
        for start in range(0, len(hidden_TD), chunk_size):
            chunk = slice(start, start + chunk_size)
            hidden_CD = hidden_TD[chunk]
            # Including the padding: the matrix units of a GPU are fast at multiples of 128 rows.
            logits_CP = F.linear(hidden_CD, weight_PD).to(wide)
            weights_C = weights_T[chunk].to(wide)
            logits_CV = logits_CP[:, :vocab_size]
            loss += token_losses(logits_CV, targets_T[chunk], weights_C).sum(dtype=torch.float64)
            logits_CP[:, vocab_size:] = 0
            grad_CP = logits_CP.to(compute)
            if grad_TD is not None:
                torch.mm(grad_CP, weight_PD, out=grad_TD[chunk])
            if grad_PD is not None and compute == wide:
                torch.addmm(grad_PD, grad_CP.t(), hidden_CD, out=grad_PD)
            elif grad_PD is not None:
                grad_PD += grad_CP.t() @ hidden_CD
            del (
                logits_CP,
                logits_CV,
                grad_CP,
            )  # free them before those of the next chunk are allocated
        ctx.save_for_backward(grad_TD, grad_PD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_TD, grad_PD = ctx.saved_tensors
        # Autograd casts to the inputs' own dtypes where autocast made them differ.
        return (
            None if grad_TD is None else _times(grad_TD, scale),
            None if grad_PD is None else _times(grad_PD, scale),
            *(None,) * 4,
        )


def _times(gradient: Tensor, scale: Tensor) -> Tensor:
    """The product, computed in at least fp32: torch rounds a scalar tensor on a GPU to bf16 before a bf16 product."""
    return (gradient.to(at_least_fp32(gradient.dtype)) * scale).to(gradient.dtype)


def _compute_dtype(hidden_TD: Tensor) -> torch.dtype:
    kind = hidden_TD.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden_TD.dtype


def _chunk_size(device_type: str, rows: int) -> int:
    """Tokens of a chunk; the same on all ranks that have as many rows of the vocabulary."""
    logits = _CHUNK_LOGITS.get(device_type, _CHUNK_LOGITS_ACCELERATOR)
    return max(_CHUNK_MIN_TOKENS, logits // rows)
