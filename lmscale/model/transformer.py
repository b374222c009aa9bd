"""The language model: a stack of blocks, a head, and the loss. One device; no collective.

Shapes: B rows, L tokens, T = B x L, D model width, V vocabulary (P: padded to a multiple of 128).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmscale.base.batch import Batch, Stream, Sums
from lmscale.model.attention import AttentionContext
from lmscale.model.dropout import Dropout, at_least_fp32
from lmscale.model.layers import Block, make_norm
from lmscale.model.loss import cross_entropy
from lmscale.modelspec.spec import Architecture


class Stack(nn.Module):
    """Embedding, blocks, and a last norm (none after post-norm blocks: their output is normed)."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        # Which part of a row's tokens this rank holds between the regions of plan.py.
        self.token_part = 0
        self.embedding = nn.Embedding(arch.padded_vocab, arch.hidden_size)
        if arch.positions == "learned":
            self.positions = nn.Embedding(arch.max_positions, arch.hidden_size)
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.num_layers))
        self.norm = make_norm(arch) if arch.norm_order == "pre" else nn.Identity()

    def forward(self, stream: Stream[Tensor], rows_B: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D], ready for a head. rows_B: global positions of the rows, for dropout."""
        x_BLD = self.embedding(stream.tokens_BL)
        if self.arch.positions == "learned":
            x_BLD = x_BLD + self.positions(stream.positions_BL)
        rate = self.arch.dropout if self.training else 0.0
        dropout = Dropout.of(x_BLD, rate, rows_B=rows_B, token_part=self.token_part)
        context = AttentionContext.of(stream, self.arch, x_BLD.dtype, dropout)
        x_BLD = dropout(x_BLD)
        for index, block in enumerate(self.blocks):
            x_BLD = block(x_BLD, context.at_layer(index))
        return self.norm(x_BLD)


class LMHead(nn.Module):
    """Hidden states -> logits or loss over the real vocabulary.

    Products go over all P rows, and their results are cut to V: see loss.py. A tied head has no weight of
    its own and is handed the embedding's.
    """

    weight: nn.Parameter | None

    def __init__(self, arch: Architecture):
        super().__init__()
        self.vocab_size = arch.vocab_size
        shape = (arch.padded_vocab, arch.hidden_size)
        self.register_parameter(
            "weight", None if arch.tie_embeddings else nn.Parameter(torch.empty(*shape))
        )

    def forward(self, hidden_BLD: Tensor, tied_PD: Tensor, batch: Batch[Tensor]) -> Sums[Tensor]:
        """Sums of the batch's weighted targets."""
        return cross_entropy(
            hidden_BLD.flatten(0, 1),
            self._weight(tied_PD),
            batch.targets_BL.flatten(),
            batch.weights_BL.flatten(),
            vocab_size=self.vocab_size,
        )

    def logits(self, hidden_BLD: Tensor, tied_PD: Tensor) -> Tensor:
        """[..., V], in at least fp32."""
        logits_BLV = F.linear(hidden_BLD, self._weight(tied_PD))[..., : self.vocab_size]
        return logits_BLV.to(at_least_fp32(logits_BLV.dtype))

    def _weight(self, tied_PD: Tensor) -> Tensor:
        return tied_PD if self.weight is None else self.weight


class LanguageModel(nn.Module):
    """A decoder and its language-model head."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.decoder = Stack(arch)
        self.heads = nn.ModuleDict({"lm": LMHead(arch)})

    def forward(self, batch: Batch[Tensor]) -> Sums[Tensor]:
        """Sum of the weighted losses of this micro-batch and the sum of its weights."""
        hidden_BLD = self.decoder(batch.inputs, batch.rows_B)
        return self.heads["lm"](hidden_BLD, self.decoder.embedding.weight, batch)

    def logits(self, batch: Batch[Tensor]) -> Tensor:
        """[B, L, V], cut to the real vocabulary; the logits at token t predict target t."""
        return self.next_logits(batch.inputs, slice(None))

    def next_logits(self, stream: Stream[Tensor], tokens: slice = slice(-1, None)) -> Tensor:
        """Logits at some of the row's tokens only (default: the last), for generation.

        All of them, where tokens are dealt out over ranks: it is the hidden states that are cut.
        """
        head = self.heads["lm"]
        assert isinstance(head, LMHead)
        return head.logits(self.decoder(stream)[:, tokens], self.decoder.embedding.weight)
