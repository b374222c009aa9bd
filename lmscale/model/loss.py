"""Cross entropy of a large vocabulary, as a sum, without ever holding all logits.

Shapes: T targets (all tokens of the batch), C tokens of one chunk, D model width, V vocabulary,
P rows that are stored for it: padded.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmscale.base.batch import Sums
from lmscale.model.dropout import at_least_fp32

# Logits of one chunk: 16 MiB of fp32 stay near the cache of a CPU; a GPU wants large products.
_CHUNK_LOGITS = {"cpu": 1 << 22}
_CHUNK_LOGITS_ACCELERATOR = 1 << 28
_CHUNK_MIN_TOKENS = 128

# (logits_CV, targets_C, weights_C) -> weighted nats of each token; turns the logits into their gradient, in place.
Nats = Callable[[Tensor, Tensor, Tensor], Tensor]


def nats_then_gradient(logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor) -> Tensor:
    """Weighted nats of each token; turns the logits into d(sum of nats)/d(logits), in place."""
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
    nats: Nats = nats_then_gradient,
) -> Sums[Tensor]:
    """Sum over tokens of weight * nats, and the sum of weights, both in fp64.

    fp64 because these sums are added over micro-batches and ranks and must not depend on the split;
    it costs one scalar. A target whose weight is 0 may be any number.

    vocab_size: the first so many rows are tokens (None: all), the others padding, whose gradient is zero.
    nats: what turns a chunk's logits into nats and gradient, where weight_PD is a part of the vocabulary.
    """
    targets_T = targets_T.masked_fill(weights_T == 0, 0)
    real = len(weight_PD) if vocab_size is None else vocab_size
    loss = _ChunkedCrossEntropy.apply(hidden_TD, weight_PD, targets_T, weights_T, nats, real)
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
        nats: Nats,
        vocab_size: int,
    ) -> Tensor:
        compute = _compute_dtype(hidden_TD)
        hidden_TD, weight_PD = hidden_TD.to(compute), weight_PD.to(compute)
        size = _chunk_size(hidden_TD.device.type, len(weight_PD))
        wide = at_least_fp32(compute)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        # Accumulated over chunks, so in fp32 where the products are bf16.
        grad_PD = torch.zeros_like(weight_PD, dtype=wide) if wants_weight else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
        for start in range(0, len(hidden_TD), size):
            chunk = slice(start, start + size)
            hidden_CD = hidden_TD[chunk]
            # With the padding: a multiple of 128 rows, over tp ranks, is what matrix units of a GPU are fast at.
            logits_CP = F.linear(hidden_CD, weight_PD).to(wide)
            weights_C = weights_T[chunk].to(wide)
            logits_CV = logits_CP[:, :vocab_size]
            loss += nats(logits_CV, targets_T[chunk], weights_C).sum(dtype=torch.float64)
            logits_CP[:, vocab_size:] = 0
            grad_CP = logits_CP.to(compute)
            if grad_TD is not None:
                torch.mm(grad_CP, weight_PD, out=grad_TD[chunk])
            if grad_PD is not None and compute == wide:
                torch.addmm(grad_PD, grad_CP.t(), hidden_CD, out=grad_PD)
            elif grad_PD is not None:
                grad_PD += grad_CP.t() @ hidden_CD
            del logits_CP, logits_CV, grad_CP  # else they live on while the next chunk's are made
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
    """In fp32: a product of a bf16 tensor and a scalar that lies on a GPU rounds the scalar to bf16 first."""
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
