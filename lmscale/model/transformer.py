"""The language model: a stack of blocks, a head, and the loss. One device; no collective.

Shapes: B rows, L tokens, T = B x L, D hidden size, V vocabulary (P: padded to a multiple of 128).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmscale.base.batch import Batch, Stream, Sums
from lmscale.model.attention import BlockContext
from lmscale.model.dropout import Dropout
from lmscale.model.kernels import at_least_fp32
from lmscale.model.layers import Block, make_norm
from lmscale.model.loss import cross_entropy
from lmscale.modelspec.spec import HeadSpec, ModelSpec, StackSpec


class Stack(nn.Module):
    """Embedding, blocks, and a last norm (none after post-norm blocks, whose output is normalised already).

    Under tensor parallelism `forward` of `embedding` is replaced on the instance, and under sequence
    parallelism that of `positions` as well: neither weight may be read past its module.
    """

    def __init__(self, spec: StackSpec):
        super().__init__()
        self.spec = spec
        # Which part of a row's tokens this rank has between tensor-parallel regions, under sequence parallelism.
        self.token_part = 0
        self.embedding = nn.Embedding(spec.padded_vocab_size, spec.hidden_size)
        if spec.positions == "learned":
            self.positions = nn.Embedding(spec.max_positions, spec.hidden_size)
        self.blocks = nn.ModuleList(
            Block(spec.block, spec.hidden_size) for _ in range(spec.num_layers)
        )
        self.norm = (
            make_norm(spec.block.norm, spec.hidden_size) if spec.final_norm else nn.Identity()
        )

    def forward(self, stream: Stream[Tensor], rows_B: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] for a head. rows_B: global positions of the rows, for dropout."""
        x_BLD = self.embedding(stream.tokens_BL)
        if self.spec.positions == "learned":
            x_BLD = x_BLD + self.positions(stream.positions_BL)
        rate = self.spec.dropout if self.training else 0.0
        dropout = Dropout.of(x_BLD, rate, rows_B=rows_B, token_part=self.token_part)
        context = BlockContext.of(stream, self.spec, x_BLD.dtype, dropout)
        x_BLD = dropout(x_BLD)
        for index, block in enumerate(self.blocks):
            x_BLD = block(x_BLD, context.for_block(index))
        return self.norm(x_BLD)


class LMHead(nn.Module):
    """Hidden states -> logits or loss over the real vocabulary.

    Products include all P rows, and their results are cut to V: see loss.py. A tied head has no weight of
    its own and is given the embedding's. Under tensor parallelism `forward` and `logits` are replaced on the
    instance (lmscale/parallel/tensor.py).
    """

    weight: nn.Parameter | None

    def __init__(self, spec: HeadSpec, stack: StackSpec):
        super().__init__()
        self.vocab_size = stack.vocab_size
        weight = None
        if not spec.tied:
            weight = nn.Parameter(torch.empty(stack.padded_vocab_size, stack.hidden_size))
        self.register_parameter("weight", weight)

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

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.decoder = Stack(spec.stack("decoder"))
        self.heads = nn.ModuleDict(
            {head.name: LMHead(head, spec.stack(head.stack)) for head in spec.heads}
        )

    def forward(self, batch: Batch[Tensor]) -> Sums[Tensor]:
        """Sum of the weighted losses of this micro-batch and the sum of its weights."""
        hidden_BLD = self.decoder(batch.inputs, batch.rows_B)
        return self.heads["lm"](hidden_BLD, self.decoder.embedding.weight, batch)

    def logits(self, batch: Batch[Tensor]) -> Tensor:
        """[B, L, V], cut to the real vocabulary; the logits at token t predict target t."""
        return self.next_logits(batch.inputs, slice(None))

    def next_logits(self, stream: Stream[Tensor], tokens: slice = slice(-1, None)) -> Tensor:
        """Logits at some of the row's tokens only (default: the last), for generation.

        Under sequence parallelism all tokens must be asked for: a rank's hidden states are a part of the row.
        """
        head = self.heads["lm"]
        assert isinstance(head, LMHead)
        return head.logits(self.decoder(stream)[:, tokens], self.decoder.embedding.weight)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a language model in the order of the forward."""
    decoder = model.get_submodule("decoder")
    return list(decoder.get_submodule("blocks").children())
