"""What a forward keeps for its backward, in bytes, by formula.

Counted as in Korthikanti et al. 2022 (arXiv:2205.05198, section 4): the inputs of each operator that its
backward reads, once where two operators read the same tensor. Theirs is s b h (34 + 5 a s / h) bytes a layer
with dropout and materialised scores; ours has neither. Letters of the comments below:

    D width · F feed_forward · N, K query and kv heads · H head size · L tokens a row · V vocabulary
    a bytes of an activation · w bytes of what is kept in at least fp32

tests/unit/launcher/test_memory_activations.py compares this with what autograd saves on a CPU. A GPU's
kernels (fused RMSNorm, flash and FlexAttention) save what their signatures say; that is not measured here.
torch.compile recomputes element-wise operators, so with engine.compile less is kept than counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lmscale.config.schema import ModelConfig
from lmscale.modelspec.parameters import padded

Device = Literal["cpu", "cuda"]
Mode = Literal["none", "selective", "full"]
_MODES: tuple[Mode, ...] = ("none", "selective", "full")

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
    modes = modes_of(model, work)
    kept = sum(count * block_bytes(model, work, mode) for mode, count in modes.items())
    again = 0.0
    if modes["full"] or modes["selective"]:
        # One block at a time is computed again and then has all of its own.
        again = block_bytes(model, work, "none")
        if not modes["full"]:
            again -= _read_again(model, work)
    last = _norm_kept(model, work) if model.norm_order == "pre" else 0
    once = last + _dropout(model, work)
    if model.positions == "rotary":
        assert model.head_dim is not None
        once += 2 * work.w * model.head_dim  # cosines and sines, shared by all layers
    return round(work.tokens * (kept + again + once))


def modes_of(model: ModelConfig, work: Work) -> Mapping[Mode, int]:
    """How many blocks recompute how much (parallel/recompute.py)."""
    kind, _, amount = work.recompute.partition(":")
    layers = model.num_layers
    match kind:
        case "none" | "full" | "selective":
            return {"none": 0, "selective": 0, "full": 0, kind: layers}
        case "every":
            full = -(-layers // int(amount))  # blocks 0, N, 2N, ...
            return {"none": layers - full, "selective": 0, "full": full}
    return _within_budget(model, work, float(amount))


def _within_budget(model: ModelConfig, work: Work, share: float) -> Mapping[Mode, int]:
    """As few full, then as few selective ones as keep `share` of what `none` keeps; as parallel/budget.py."""
    none, selective, full = (block_bytes(model, work, mode) for mode in _MODES)
    room = share * model.num_layers * none
    for again in range(model.num_layers + 1):
        rest = model.num_layers - again
        spare = room - again * full - rest * selective
        if spare >= 0:
            plain = min(rest, int(spare / (none - selective)))
            return {"none": plain, "selective": rest - plain, "full": again}
    return {"none": 0, "selective": 0, "full": model.num_layers}


def smallest_budget(model: ModelConfig, work: Work) -> float:
    """The share of what `none` keeps that `full` keeps: with less in budget:FRACTION no run starts."""
    return block_bytes(model, work, "full") / block_bytes(model, work, "none")


def block_bytes(model: ModelConfig, work: Work, mode: Mode) -> float:
    """What a block keeps, in bytes a token."""
    match mode:
        case "none":
            return _block(model, work)
        case "selective":
            return _selected(model, work)
    return work.a * _shared(model, work)  # its input


def loss_bytes(model: ModelConfig, work: Work) -> int:
    """Logits of a chunk and the gradients that head and loss make in their one pass (model/loss.py)."""
    vocab, width = padded(work.vocab_size) // work.tp, model.hidden_size
    chunk = max(_CHUNK_MIN_TOKENS, _CHUNK_LOGITS[work.device] // vocab)
    lowered = work.a if work.a < work.w else 0  # a second copy in the compute type
    logits = min(work.tokens, chunk) * vocab * (work.w + lowered) + lowered * vocab * width
    weight = work.w * vocab * width  # of the head, once accumulated and once scaled in the backward
    return weight + max(logits, weight) + 2 * work.a * work.tokens * width


def _block(model: ModelConfig, work: Work) -> float:
    """Bytes a token of one block."""
    # Each norm, and the whole hidden states that attention and feed-forward take in: with sequence
    # parallelism they are gathered for it, and kept as the matrices' input (Megatron gathers them again).
    return (
        2 * (_norm_kept(model, work) + work.a * model.hidden_size)
        + _attention(model, work)
        + work.a * _FEED_FORWARD[model.activation][0] * model.ffn_hidden_size / work.tp
        + 2 * _dropout(model, work)
    )


# Tensors of F that the feed-forward keeps, and how many of them are products. swiglu: gate, silu(gate), up and
# their product; gelu: before and after; relu: its result serves both backwards.
_FEED_FORWARD = {"swiglu": (4, 2), "gelu": (2, 1), "gelu_tanh": (2, 1), "relu": (1, 1)}


def _selected(model: ModelConfig, work: Work) -> float:
    """The input of the block, and the results of matrix products, of attention and of collectives.

    All of them, the projections back to D too, though no backward reads those. Of collectives: what leaves
    attention and feed-forward, and with sequence parallelism what they take in.
    """
    _, products = _FEED_FORWARD[model.activation]
    back = 2 * work.a * model.hidden_size
    moved = 0.0
    if work.tp > 1:
        moved = 2 * work.a * _shared(model, work)
        moved += 2 * work.a * model.hidden_size if work.sequence_parallel else 0
    return (
        work.a * _shared(model, work)
        + _heads(model, work)
        + work.a * products * model.ffn_hidden_size / work.tp
        + back
        + moved
    )


def _read_again(model: ModelConfig, work: Work) -> float:
    """Of a block that is selectively computed again: what it keeps and its backward reads, so that it is there once.

    q and k are computed again where they are turned.
    """
    _, products = _FEED_FORWARD[model.activation]
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    heads = _heads(model, work)
    if model.positions == "rotary":
        heads -= work.a * (model.num_heads + model.num_kv_heads) * model.head_dim / work.tp
    products_read = products - (model.activation == "relu")
    gathered = 2 * work.a * model.hidden_size if work.sequence_parallel else 0
    return heads + work.a * products_read * model.ffn_hidden_size / work.tp + gathered


def _attention(model: ModelConfig, work: Work) -> float:
    """q, k, v, the result and the log-sum of each row of scores: no L x L scores, on any device.

    On a CPU separate documents are an additive mask, B L L of the compute type, made anew by each layer. On a
    GPU they are FlexAttention's table of blocks, which is small.
    """
    mask = work.a * work.seq_len if work.separate and work.device == "cpu" else 0
    return _heads(model, work) + _repeated(model, work) + mask


def _heads(model: ModelConfig, work: Work) -> float:
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    heads = (
        work.a * 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
        + work.w * model.num_heads
    )
    return heads / work.tp


def _repeated(model: ModelConfig, work: Work) -> float:
    """CUDA's kernels for fp32 know no groups: keys and values are repeated for the queries that share them."""
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    if work.device == "cpu" or work.precision != "fp32" or work.separate:
        return 0
    return work.a * 2 * (model.num_heads - model.num_kv_heads) * model.head_dim / work.tp


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
    return model.hidden_size / work.tp if work.sequence_parallel else model.hidden_size
