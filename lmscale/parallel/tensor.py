"""Embedding and cross entropy where each tensor-parallel rank has some of the vocabulary's rows.

No rank ever holds all logits of a token. Sums over ranks in a chunk of the loss: the largest logit, then in
one collective the sum of exponentials and the target's logit (arXiv:1909.08053, section 3).

Shapes: B rows, L tokens, T = B x L, C tokens of a chunk, D width, V vocabulary, P padded vocabulary,
p = P / tp stored rows of this rank, v of them real.

Tensor parallelism: each rank of a tp group holds and multiplies with its part of the matrices.

The model says what may be cut (model/plan.py); this pass cuts it. A cut parameter is an ordinary, smaller
parameter under its old name, whatever engine comes after.

                 hidden states are whole            with sequence parallelism, tokens are dealt out
    into region  enter: backward sums               gather_tokens: backward sums and deals out
    out of it    leave: forward sums                scatter_tokens: forward sums and deals out
    in between   norms and dropout on all tokens,   norms and dropout on this rank's tokens, l of L;
                 the same on every rank             their parameters' gradients are partial sums
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
from lmscale.model.dropout import at_least_fp32
from lmscale.model.loss import cross_entropy
from lmscale.model.tp_plan import PLAN, REGIONS, Cut, cut_dim
from lmscale.parallel.blocks import set_forward
from lmscale.parallel.collectives import (
    enter,
    gather_last,
    gather_tokens,
    leave,
    scatter_tokens,
    sum_ranks,
)


@dataclass(frozen=True)
class VocabularyRange:
    """This rank's part of the vocabulary."""

    first: int  # id of its first row
    stored: int  # p
    real: int  # v; the padding of the vocabulary is at the end of the last ranks
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


Move = Callable[[Tensor], Tensor]


def split_tensors(model: nn.Module, mesh: Mesh, *, sequence_parallel: bool) -> None:
    """Keep this tp rank's part of every parameter that the plan cuts, and make the forward right again.

    In place; names stay, cut parameters are new objects. Not collective. The config check has seen that
    heads, kv heads, hidden size and padded vocabulary divide by tp, and tokens under sequence parallelism.
    """
    into: Move = partial(gather_tokens if sequence_parallel else enter, group=mesh.tp_group)
    out_of: Move = partial(scatter_tokens if sequence_parallel else leave, group=mesh.tp_group)
    _cut_parameters(model, mesh)
    for _, module in _matching(model, "rows"):
        set_forward(module, partial(_rows_forward, module, out_of))
    for _, module in _regions(model):
        set_forward(module, _entered(module.forward, into))
    _split_vocabulary(model, mesh, into, out_of)
    if sequence_parallel:
        decoder = cast(Any, model).decoder
        decoder.token_part = mesh.tp_rank
        if hasattr(decoder, "positions"):
            _deal_out_positions(decoder.positions, mesh)


@torch.no_grad()
def _cut_parameters(model: nn.Module, mesh: Mesh) -> None:
    for name, parameter in list(model.named_parameters()):
        dim = cut_dim(name)
        if dim is None:
            continue
        assert parameter.shape[dim] % mesh.tp_size == 0, f"{name} {tuple(parameter.shape)}"
        part = parameter.chunk(mesh.tp_size, dim)[mesh.tp_rank]
        # A copy, so that the whole is freed.
        local = nn.Parameter(
            part.clone(memory_format=torch.contiguous_format), parameter.requires_grad
        )
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, local)


def _rows_forward(module: nn.Module, out_of: Move, x: Tensor) -> Tensor:
    y_BlD = out_of(F.linear(x, cast(Tensor, module.weight)))
    # Added once, after the sum.
    return y_BlD if module.bias is None else y_BlD + cast(Tensor, module.bias)


def _entered(forward: Callable[..., Any], into: Move) -> Callable[..., Any]:
    def run(x: Tensor, *rest: Any) -> Any:
        return forward(into(x), *rest)

    return run


def _split_vocabulary(model: nn.Module, mesh: Mesh, into: Move, out_of: Move) -> None:
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

    set_forward(embedding, embed)
    set_forward(head, loss)
    cast(Any, head).logits = logits


def _deal_out_positions(positions: nn.Module, mesh: Mesh) -> None:
    forward = positions.forward

    def part(ids_BL: Tensor) -> Tensor:
        return forward(ids_BL.chunk(mesh.tp_size, 1)[mesh.tp_rank])

    set_forward(positions, part)


def _matching(model: nn.Module, cut: Cut) -> Iterator[tuple[str, nn.Module]]:
    patterns = [pattern for pattern, found in PLAN.items() if found == cut]
    return (
        (name, module)
        for name, module in model.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def _regions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Blocks' regions; the head's is entered by its own forward, which has a second one for logits."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if name.startswith("decoder.") and any(fnmatchcase(name, pattern) for pattern in REGIONS)
    )
