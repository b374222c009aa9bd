"""The specification of a model: stacks of equal blocks, and heads. No torch and no configuration here.

The model is built from it (lmscale/model), and everything that is computed about a model without building it
follows from it: parameters.py, activations.py, flops.py. lmscale/config/model_spec.py makes it from a run file.

An encoder will be a second StackSpec, and cross attention a third entry of BlockSpec.branches.
"""

from dataclasses import dataclass

from lmscale.modelspec.feed_forward import FEED_FORWARDS, FeedForwardKind

# The embedding and the head have a multiple of this number of rows, for every tensor parallel size, so that
# a parameter has one global shape.
VOCAB_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding and the head as stored."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """One normalisation over the hidden size."""

    kind: str  # rms | layer
    eps: float
    bias: bool  # of a layer norm; an RMS norm has none


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Softmax attention; query heads share kv heads (arXiv:2305.13245)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool

    @property
    def query_size(self) -> int:
        """Elements of all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all key heads of one token, and of all value heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardSpec:
    """One feed-forward."""

    kind: str  # a key of FEED_FORWARDS
    hidden_size: int  # F
    bias: bool

    @property
    def properties(self) -> FeedForwardKind:
        """Matrices and saved activations of this kind."""
        return FEED_FORWARDS[self.kind]


BranchSpec = AttentionSpec | FeedForwardSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """One layer: branches in the order of the forward, each with its norm and a residual connection."""

    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    norm: NormSpec
    norm_order: str  # pre: x + branch(norm(x)); post: norm(x + branch(x))

    @property
    def branches(self) -> tuple[tuple[str, BranchSpec], ...]:
        """Name and specification; the branch `x` has the modules `norm_x` and `x`."""
        return (("attention", self.attention), ("feed_forward", self.feed_forward))


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSpec:
    """Embedding, positions, `num_layers` equal blocks, and a last norm where the norms come first."""

    name: str  # first part of its parameters' names
    vocab_size: int  # ids that the tokenizer can produce
    hidden_size: int
    num_layers: int
    block: BlockSpec
    positions: str  # rotary | learned | none
    max_positions: int  # rows of the learned position table, and the longest row of tokens
    rope_theta: float
    dropout: float  # of the embedding and of each branch

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as stored."""
        return padded_vocab_size(self.vocab_size)

    @property
    def final_norm(self) -> bool:
        """Whether a norm follows the last block. The output of a post-norm block is normalised already."""
        return self.block.norm_order == "pre"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """A linear layer from hidden states to the vocabulary."""

    name: str  # of the module heads.<name>
    stack: str  # whose hidden states it reads
    tied: bool  # its weight is the embedding of that stack


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole model."""

    stacks: tuple[StackSpec, ...]
    heads: tuple[HeadSpec, ...]
    init_std: float  # standard deviation of the initial weights
    trainable: tuple[str, ...]  # name patterns of the parameters that are trained

    def stack(self, name: str) -> StackSpec:
        """The stack of this name."""
        (stack,) = (stack for stack in self.stacks if stack.name == name)
        return stack
