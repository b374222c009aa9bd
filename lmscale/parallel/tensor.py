"""Tensor parallelism: each rank of a tp group stores a part of the matrices and multiplies with it.

lmscale/modelspec/tensor_parallel.py lists what is split; this pass splits it. A split parameter is an ordinary,
smaller parameter under its old name, whatever engine comes after.

                 hidden states are whole            with sequence parallelism, tokens are split
    into region  enter_region: backward sums        gather_tokens: backward sums and splits
    out of it    leave_region: forward sums         scatter_tokens: forward sums and splits
    in between   norms and dropout on all tokens,   norms and dropout on this rank's tokens, l of L;
                 the same on every rank             their parameters' gradients are partial sums

Shapes: B rows, L tokens, T = B x L, C tokens of a chunk, D hidden size, V vocabulary, P padded vocabulary,
p = P / tp stored rows of this rank, v of them real.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lmscale.base.batch import Batch, Sums
from lmscale.distributed.mesh import Mesh
from lmscale.model.kernels import at_least_fp32
from lmscale.model.layers import replace_forward
from lmscale.model.loss import cross_entropy
from lmscale.modelspec.tensor_parallel import PARALLEL_REGIONS, TP_STYLES, TpStyle, tp_dim
from lmscale.parallel.collectives import (
    enter_region,
    gather_last,
    gather_tokens,
    leave_region,
    scatter_tokens,
    sum_ranks,
)

# Hidden states at the border of a tensor-parallel region.
Transfer = Callable[[Tensor], Tensor]


def split_tensors(model: nn.Module, mesh: Mesh, *, sequence_parallel: bool) -> None:
    """Replace every split parameter by this tp rank's part, and the forwards that read them.

    In place; names stay, split parameters are new objects. Not collective. The config check has ensured that tp
    divides heads, kv heads, hidden size and padded vocabulary, and under sequence parallelism the tokens of a row.
    """
    into: Transfer = partial(
        gather_tokens if sequence_parallel else enter_region, group=mesh.tp_group
    )
    out_of: Transfer = partial(
        scatter_tokens if sequence_parallel else leave_region, group=mesh.tp_group
    )
    _split_parameters(model, mesh)
    for _, module in _matching(model, "rows"):
        replace_forward(module, partial(_rows_forward, module, out_of))
    for _, module in _regions(model):
        replace_forward(module, _region_forward(module.forward, into))
    _split_vocabulary(model, mesh, into, out_of)
    if sequence_parallel:
        decoder = cast(Any, model).decoder
        decoder.token_part = mesh.tp_rank
        if hasattr(decoder, "positions"):
            _split_positions(decoder.positions, mesh)


@torch.no_grad()
def _split_parameters(model: nn.Module, mesh: Mesh) -> None:
    for name, parameter in list(model.named_parameters()):
        dim = tp_dim(name)
        if dim is None:
            continue
        assert parameter.shape[dim] % mesh.tp_size == 0, f"{name} {tuple(parameter.shape)}"
        part = parameter.chunk(mesh.tp_size, dim)[mesh.tp_rank]
        # A copy, so that the memory of the whole parameter is freed.
        local = nn.Parameter(
            part.clone(memory_format=torch.contiguous_format), parameter.requires_grad
        )
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, local)


def _rows_forward(module: nn.Module, out_of: Transfer, x: Tensor) -> Tensor:
    y_BlD = out_of(F.linear(x, cast(Tensor, module.weight)))
    # The bias is added once, after the sum.
    return y_BlD if module.bias is None else y_BlD + cast(Tensor, module.bias)


def _region_forward(forward: Callable[..., Any], into: Transfer) -> Callable[..., Any]:
    def run(x: Tensor, *rest: Any) -> Any:
        return forward(into(x), *rest)

    return run


def _split_vocabulary(model: nn.Module, mesh: Mesh, into: Transfer, out_of: Transfer) -> None:
    embedding = model.get_submodule("decoder.embedding")
    head = model.get_submodule("heads.lm")
    rows = VocabularyRange.of(
        len(cast(Tensor, embedding.weight)),
        vocab_size=cast(int, head.vocab_size),
        rank=mesh.tp_rank,
        group=mesh.tp_group,
    )

    def embed(ids_BL: Tensor) -> Tensor:
        return out_of(rows.embed(ids_BL, cast(Tensor, embedding.weight)))

    def weight_of(tied_pD: Tensor) -> Tensor:
        return tied_pD if head.weight is None else cast(Tensor, head.weight)

    def loss(hidden_BlD: Tensor, tied_pD: Tensor, batch: Batch[Tensor]) -> Sums[Tensor]:
        return rows.loss(into(hidden_BlD), weight_of(tied_pD), batch)

    def logits(hidden_BlD: Tensor, tied_pD: Tensor) -> Tensor:
        return rows.logits(into(hidden_BlD), weight_of(tied_pD))

    replace_forward(embedding, embed)
    replace_forward(head, loss)
    cast(Any, head).logits = logits


def _split_positions(positions: nn.Module, mesh: Mesh) -> None:
    forward = positions.forward

    def part(ids_BL: Tensor) -> Tensor:
        return forward(ids_BL.chunk(mesh.tp_size, 1)[mesh.tp_rank])

    replace_forward(positions, part)


def _matching(model: nn.Module, style: TpStyle) -> Iterator[tuple[str, nn.Module]]:
    patterns = [pattern for pattern, other in TP_STYLES.items() if other == style]
    return (
        (name, module)
        for name, module in model.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def _regions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The regions inside blocks. The head enters its region in its own two forwards, of loss and of logits."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if name.startswith("decoder.")
        and any(fnmatchcase(name, pattern) for pattern in PARALLEL_REGIONS)
    )


@dataclass(frozen=True)
class VocabularyRange:
    """The rows of the vocabulary that one tp rank stores, and what it computes with them.

    No rank ever stores all logits of a token. Two collectives per chunk of the loss: the largest logit, then the
    sum of exponentials together with the target's logit (arXiv:1909.08053, section 3).
    """

    first: int  # id of its first row
    stored: int  # p
    real: int  # v; the padding of the vocabulary is at the end of the last ranks, which may have nothing else
    vocab_size: int  # V
    group: dist.ProcessGroup

    @classmethod
    def of(
        cls, stored: int, *, vocab_size: int, rank: int, group: dist.ProcessGroup
    ) -> "VocabularyRange":
        """The rows of a tp rank that stores `stored` of them."""
        first = rank * stored
        return cls(first, stored, min(stored, max(0, vocab_size - first)), vocab_size, group)

    def embed(self, ids_BL: Tensor, weight_pD: Tensor) -> Tensor:
        """[B, L, D]; zero for ids of other ranks, so that the sum over ranks is the embedding."""
        local_BL, is_local_BL = self._local(ids_BL)
        x_BLD = F.embedding(local_BL, weight_pD)
        return x_BLD.masked_fill(~is_local_BL[..., None], 0)

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
            token_losses=self._chunk_loss,
        )

    @torch.no_grad()
    def logits(self, hidden_BLD: Tensor, weight_pD: Tensor) -> Tensor:
        """[..., V], whole on every rank. Collective over tp."""
        logits_BLP = gather_last(F.linear(hidden_BLD, weight_pD), self.group)
        return logits_BLP[..., : self.vocab_size].to(at_least_fp32(logits_BLP.dtype))

    def _chunk_loss(self, logits_Cv: Tensor, targets_C: Tensor, weights_C: Tensor) -> Tensor:
        """Weighted losses of each token; overwrites the logits with their gradient. Collective over tp."""
        if not self.real:
            return self._padding_only(logits_Cv, targets_C, weights_C)
        local_C, is_local_C = self._local(targets_C)
        rows_C = torch.arange(len(targets_C), device=targets_C.device)
        target_logit_C = logits_Cv[rows_C, local_C].masked_fill(~is_local_C, 0)
        largest_C = sum_ranks(logits_Cv.amax(1), self.group, "max")
        total_C = logits_Cv.sub_(largest_C[:, None]).exp_().sum(1)
        total_C, target_logit_C = sum_ranks(torch.stack([total_C, target_logit_C]), self.group)
        logits_Cv.mul_((weights_C / total_C)[:, None])
        logits_Cv[rows_C, local_C] -= weights_C.masked_fill(~is_local_C, 0)
        return (total_C.log() + largest_C - target_logit_C) * weights_C

    def _padding_only(self, logits_Cv: Tensor, targets_C: Tensor, weights_C: Tensor) -> Tensor:
        """The same collectives on a rank whose rows are all padding."""
        lowest_C = logits_Cv.new_full((len(targets_C),), -torch.inf)
        largest_C = sum_ranks(lowest_C, self.group, "max")
        total_C, target_logit_C = sum_ranks(logits_Cv.new_zeros(2, len(targets_C)), self.group)
        return (total_C.log() + largest_C - target_logit_C) * weights_C

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Index of each id among this rank's rows (0 where it is on another rank), and whether it is here."""
        local = ids - self.first
        is_local = (local >= 0) & (local < self.real)
        return local.masked_fill(~is_local, 0), is_local
