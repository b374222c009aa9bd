"""The numbers one model is built from, with every default of the run file resolved."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from lmscale.config.schema import ModelConfig

VOCAB_MULTIPLE = 128  # whatever the tensor parallel size is, so that a parameter has one shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """ModelConfig plus what only the corpus and the run know; meanings in config/sections.py."""

    vocab_size: int  # ids the tokenizer can produce
    max_positions: int  # rows of the learned position table; unused otherwise
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int  # hidden size F
    norm: str = "rms"  # rms | layer
    norm_order: str = "pre"  # pre | post
    norm_eps: float = 1e-5
    positions: str = "rotary"  # rotary | learned | none
    rope_theta: float = 10_000.0
    activation: str = "swiglu"  # swiglu | gelu (erf) | gelu_tanh (GPT-2's) | relu
    bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    @classmethod
    def of(
        cls, cfg: Union["ModelConfig", "Architecture"], *, vocab_size: int, max_positions: int
    ) -> "Architecture":
        """Resolve what the run file leaves open: vocabulary and position table."""
        given = {f.name: getattr(cfg, f.name) for f in fields(cls)}
        given["vocab_size"] = vocab_size
        given["max_positions"] = cfg.max_positions or max_positions
        return cls(**given)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and the head as stored."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
