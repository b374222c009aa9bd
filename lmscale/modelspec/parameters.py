"""The parameters of a model by formula: what lmscale.model would build, without torch.

A test holds names, shapes and cuts against the model that is really built.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from lmscale.config.schema import ModelConfig

_VOCAB_MULTIPLE = 128  # rows of the embedding and the head are padded to it, whatever tp is


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the model, under its global shape."""

    name: str
    shape: tuple[int, ...]
    cut: int | None = None  # the dimension that tensor parallelism cuts

    @property
    def size(self) -> int:
        """Its elements."""
        return prod(self.shape)

    def slice_of(self, tp: int) -> "Parameter":
        """What one of `tp` ranks holds of it."""
        if self.cut is None or tp == 1:
            return self
        shape = tuple(-(-n // tp) if i == self.cut else n for i, n in enumerate(self.shape))
        return Parameter(self.name, shape, self.cut)

    @property
    def in_block(self) -> bool:
        """Whether it belongs to a block; the rest (embedding, last norm, head) is one group."""
        return self.name.startswith("decoder.blocks.")


def parameters(model: ModelConfig, *, vocab_size: int, max_positions: int) -> tuple[Parameter, ...]:
    """Every parameter, in the model's order. A tied head is the embedding and counts once."""
    return tuple(_all(model, padded(vocab_size), max_positions))


def padded(vocab_size: int) -> int:
    """Rows of the embedding and the head as stored."""
    return -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def total(found: Iterable[Parameter]) -> int:
    """Elements of all of them."""
    return sum(one.size for one in found)


def trainable(model: ModelConfig, found: Iterable[Parameter]) -> tuple[Parameter, ...]:
    """Those that learn: the ones that model.trainable names."""
    patterns = model.trainable
    return tuple(p for p in found if any(fnmatchcase(p.name, pattern) for pattern in patterns))


def _all(model: ModelConfig, vocab: int, max_positions: int) -> Iterator[Parameter]:
    yield Parameter("decoder.embedding.weight", (vocab, model.hidden_size), 0)
    if model.positions == "learned":
        yield Parameter("decoder.positions.weight", (max_positions, model.hidden_size))
    for number in range(model.num_layers):
        yield from _block(model, f"decoder.blocks.{number}")
    if model.norm_order == "pre":
        yield from _norm(model, "decoder.norm")
    if not model.tie_embeddings:
        yield Parameter("heads.lm.weight", (vocab, model.hidden_size), 0)


def _block(model: ModelConfig, name: str) -> Iterator[Parameter]:
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    width, hidden = model.hidden_size, model.ffn_hidden_size
    wide, narrow = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    yield from _norm(model, f"{name}.norm_attention")
    for letter, out in (("q", wide), ("k", narrow), ("v", narrow)):
        yield from _columns(model, f"{name}.attention.{letter}", (out, width))
    yield from _rows(model, f"{name}.attention.out", (width, wide))
    yield from _norm(model, f"{name}.norm_feed_forward")
    for part in ("gate", "up") if model.activation == "swiglu" else ("up",):
        yield from _columns(model, f"{name}.feed_forward.{part}", (hidden, width))
    yield from _rows(model, f"{name}.feed_forward.down", (width, hidden))


def _norm(model: ModelConfig, name: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (model.hidden_size,))
    if model.norm == "layer" and model.bias:
        yield Parameter(f"{name}.bias", (model.hidden_size,))


def _columns(model: ModelConfig, name: str, shape: tuple[int, int]) -> Iterator[Parameter]:
    """A linear whose outputs are cut, bias included."""
    yield Parameter(f"{name}.weight", shape, 0)
    if model.bias:
        yield Parameter(f"{name}.bias", shape[:1], 0)


def _rows(model: ModelConfig, name: str, shape: tuple[int, int]) -> Iterator[Parameter]:
    """A linear whose inputs are cut; its bias is whole on every rank."""
    yield Parameter(f"{name}.weight", shape, 1)
    if model.bias:
        yield Parameter(f"{name}.bias", shape[:1])
