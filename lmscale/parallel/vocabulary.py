"""Embedding and cross entropy where each tensor-parallel rank has some of the vocabulary's rows.

No rank ever holds all logits of a token. Sums over ranks in a chunk of the loss: the largest logit, then in
one collective the sum of exponentials and the target's logit (arXiv:1909.08053, section 3).

Shapes: B rows, L tokens, T = B x L, C tokens of a chunk, D width, V vocabulary, P padded vocabulary,
p = P / tp stored rows of this rank, v of them real.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lmscale.batch import Batch, Sums
from lmscale.model.loss import cross_entropy
from lmscale.model.precision import at_least_fp32
from lmscale.parallel.collectives import gather_last, sum_ranks


@dataclass(frozen=True)
class Rows:
    """This rank's part of the vocabulary."""

    first: int  # id of its first row
    stored: int  # p
    real: int  # v; the padding of the vocabulary is at the end of the last ranks
    vocab_size: int  # V
    group: dist.ProcessGroup

    @classmethod
    def of(cls, stored: int, *, vocab_size: int, rank: int, group: dist.ProcessGroup) -> "Rows":
        """The rows of a tp rank that stores `stored` of them."""
        first = rank * stored
        return cls(first, stored, min(stored, max(0, vocab_size - first)), vocab_size, group)

    def embed(self, ids_BL: Tensor, weight_pD: Tensor) -> Tensor:
        """[B, L, D]; zero for ids of other ranks, so the sum over ranks is the embedding."""
        local_BL, mine_BL = self._local(ids_BL)
        x_BLD = F.embedding(local_BL, weight_pD)
        return x_BLD.masked_fill(~mine_BL[..., None], 0)

    def loss(self, hidden_BLD: Tensor, weight_pD: Tensor, batch: Batch[Tensor]) -> Sums[Tensor]:
        """Sums of the batch, the same on every rank. The gradient of hidden_BLD is this rank's share.

        Collective over tp, in every chunk.
        """
        return cross_entropy(
            hidden_BLD.flatten(0, 1),
            weight_pD,
            batch.targets_BL.flatten(),
            batch.weights_BL.flatten(),
            vocab_size=self.real,
            nats=self._nats_then_gradient,
        )

    @torch.no_grad()
    def logits(self, hidden_BLD: Tensor, weight_pD: Tensor) -> Tensor:
        """[..., V], whole on every rank. Collective over tp."""
        logits_BLP = gather_last(F.linear(hidden_BLD, weight_pD), self.group)
        return logits_BLP[..., : self.vocab_size].to(at_least_fp32(logits_BLP.dtype))

    def _nats_then_gradient(
        self, logits_Cv: Tensor, targets_C: Tensor, weights_C: Tensor
    ) -> Tensor:
        if not self.real:  # nothing but padding here
            return self._padding_only(logits_Cv, targets_C, weights_C)
        local_C, mine_C = self._local(targets_C)
        rows_C = torch.arange(len(targets_C), device=targets_C.device)
        target_logit_C = logits_Cv[rows_C, local_C].masked_fill(~mine_C, 0)
        largest_C = sum_ranks(logits_Cv.amax(1), self.group, "max")
        total_C = logits_Cv.sub_(largest_C[:, None]).exp_().sum(1)
        total_C, target_logit_C = sum_ranks(torch.stack([total_C, target_logit_C]), self.group)
        logits_Cv.mul_((weights_C / total_C)[:, None])
        logits_Cv[rows_C, local_C] -= weights_C.masked_fill(~mine_C, 0)
        return (total_C.log() + largest_C - target_logit_C) * weights_C

    def _padding_only(self, logits_Cv: Tensor, targets_C: Tensor, weights_C: Tensor) -> Tensor:
        least_C = logits_Cv.new_full((len(targets_C),), -torch.inf)
        largest_C = sum_ranks(least_C, self.group, "max")
        total_C, target_logit_C = sum_ranks(logits_Cv.new_zeros(2, len(targets_C)), self.group)
        return (total_C.log() + largest_C - target_logit_C) * weights_C

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Place of each id among this rank's rows (0 where it is another's), and whether it is its."""
        local = ids - self.first
        mine = (local >= 0) & (local < self.real)
        return local.masked_fill(~mine, 0), mine
