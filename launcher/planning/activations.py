"""What a forward keeps for its backward, in bytes, by formula.

Counted as in Korthikanti et al. 2022 (arXiv:2205.05198, section 4): the inputs of each operator that its
backward reads, once where two operators read the same tensor. Theirs is s b h (34 + 5 a s / h) bytes a layer
with dropout and materialised scores; ours has neither. Letters of the comments below:

    D width · F feed_forward · N, K query and kv heads · H head size · L tokens a row · V vocabulary
    a bytes of an activation · w bytes of what is kept in at least fp32

tests/unit/launcher/test_memory_activations.py holds this against what autograd really saves on a CPU. A GPU's
kernels (fused RMSNorm, flash and FlexAttention) save what their signatures say; that is not measured here.
torch.compile recomputes element-wise operators, so with engine.compile less is kept than counted.
"""

from dataclasses import dataclass
from typing import Literal

from lmscale.config.sections import ModelConfig

Device = Literal["cpu", "cuda"]

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
# lmscale/model/loss.py: elements of one chunk of logits, and the fewest tokens of a chunk.
_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
_CHUNK_MIN_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One micro-batch on one rank."""

    device: Device
    precision: str  # engine.precision
    rows: int  # samples
    seq_len: int
    vocab_size: int
    separate: bool  # data.documents: separate, so attention has a mask
    recompute: str = "none"  # engine.activation_checkpointing
    tp: int = 1
    sequence_parallel: bool = False

    @property
    def a(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.precision]

    @property
    def w(self) -> int:
        """Bytes of what is kept in at least fp32."""
        return max(4, self.a)

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch, fillers included."""
        return self.rows * self.seq_len


def activation_bytes(model: ModelConfig, work: Work) -> int:
    """All that is kept from the forward of one micro-batch until its backward, without the loss."""
    block = _block(model, work)
    kept = block * model.layers
    if every := _every(work.recompute):
        inputs = -(-model.layers // every)  # blocks 0, N, 2N, ... keep their input only
        one_input = work.a * _shared(model, work)
        # One block at a time is computed again and then has all of its own.
        kept = inputs * one_input + (model.layers - inputs) * block + block
    last = _norm_kept(model, work) if model.norm_place == "pre" else 0
    once = last + _dropout(model, work)
    if model.positions == "rotary":
        assert model.head_dim is not None
        once += 2 * work.w * model.head_dim  # cosines and sines, shared by all layers
    return round(work.tokens * (kept + once))


def loss_bytes(model: ModelConfig, work: Work) -> int:
    """Logits of a chunk and the gradients that head and loss make in their one pass (model/loss.py)."""
    vocab, width = -(-work.vocab_size // work.tp), model.width
    chunk = max(_CHUNK_MIN_TOKENS, _CHUNK_LOGITS[work.device] // vocab)
    lowered = work.a if work.a < work.w else 0  # a second copy in the compute type
    logits = min(work.tokens, chunk) * vocab * (work.w + lowered) + lowered * vocab * width
    weight = work.w * vocab * width  # of the head, once accumulated and once scaled in the backward
    return weight + max(logits, weight) + 2 * work.a * work.tokens * width


def _block(model: ModelConfig, work: Work) -> float:
    """Bytes a token of one block."""
    return (
        2 * (_norm_kept(model, work) + work.a * _shared(model, work))  # and each norm's output
        + _attention(model, work)
        + work.a * _FEED_FORWARD[model.activation] * model.feed_forward / work.tp
        + 2 * _dropout(model, work)
    )


# Tensors of F that the feed-forward keeps. swiglu: gate, silu(gate), up and their product; gelu: before
# and after; relu: its result serves both backwards.
_FEED_FORWARD = {"swiglu": 4, "gelu": 2, "gelu_tanh": 2, "relu": 1}


def _attention(model: ModelConfig, work: Work) -> float:
    """q, k, v, the result and the log-sum of each row of scores: no L x L scores, on any device.

    On a CPU separate documents are an additive mask, B L L of the compute type, made anew by each layer. On a
    GPU they are FlexAttention's table of blocks, which is small.
    """
    assert model.kv_heads is not None
    assert model.head_dim is not None
    heads = work.a * 2 * (model.heads + model.kv_heads) * model.head_dim + work.w * model.heads
    mask = work.a * work.seq_len if work.separate and work.device == "cpu" else 0
    return heads / work.tp + mask


def _norm_kept(model: ModelConfig, work: Work) -> float:
    """The input and its statistics; without a fused kernel RMSNorm keeps two tensors in fp32."""
    if model.norm == "rms" and work.device == "cpu":
        return 2 * work.w * _shared(model, work) + work.w
    return work.a * _shared(model, work) + (1 if model.norm == "rms" else 2) * work.w


def _dropout(model: ModelConfig, work: Work) -> float:
    """A mask of one byte an element; on a CPU of the compute type."""
    if not model.dropout:
        return 0
    return (1 if work.device == "cuda" else work.a) * _shared(model, work)


def _shared(model: ModelConfig, work: Work) -> float:
    """D, or this rank's share of it where sequence parallelism cuts the tokens between the layers."""
    return model.width / work.tp if work.sequence_parallel else model.width


def _every(mode: str) -> int:
    """Every how many blocks one is recomputed; 0: none. Shares and selections count as none."""
    if mode == "full":
        return 1
    return int(mode.removeprefix("every:")) if mode.startswith("every:") else 0
