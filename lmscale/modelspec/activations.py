"""Memory of the activations of one micro-batch, by formula: what a forward saves for its backward, in bytes.

Counted as in Korthikanti et al. 2022 (arXiv:2205.05198, section 4): the inputs of each operator that its
backward reads, counted once where two operators read the same tensor. Their result is s b h (34 + 5 a s / h)
bytes per layer with dropout and materialised scores; our model has neither. Letters of the comments below:

    D hidden size · F hidden size of the feed-forward · L tokens per row · V vocabulary

tests/unit/modelspec/test_activations.py compares this with what autograd saves on a CPU. A GPU's
kernels (fused RMSNorm, flash and FlexAttention) save what their signatures say; that is not measured here.
torch.compile recomputes element-wise operators, so with engine.compile less is saved than counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lmscale.modelspec.spec import ModelSpec, StackSpec

Device = Literal["cpu", "cuda"]
RecomputeMode = Literal["none", "selective", "full"]
_MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
# lmscale/model/loss.py: elements of one chunk of logits, and the smallest number of tokens of a chunk.
_CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
_CHUNK_MIN_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One micro-batch on one rank, and how the rank computes it."""

    device: Device
    precision: str  # engine.precision
    rows: int  # samples
    seq_len: int
    separate: bool  # data.documents is separate, so attention has a mask
    recompute: str = "none"  # engine.activation_checkpointing
    tp: int = 1
    sequence_parallel: bool = False

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element of an activation."""
        return BYTES[self.precision]

    @property
    def wide_bytes(self) -> int:
        """Bytes of an element that is stored in at least fp32."""
        return max(4, self.compute_bytes)

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch, fillers included."""
        return self.rows * self.seq_len


def activation_bytes(spec: ModelSpec, batch: MicroBatch) -> int:
    """Everything that is saved from the forward of one micro-batch until its backward, without the loss."""
    per_token = 0.0
    recomputed = 0.0  # by the block that is recomputed; one block at a time, over all stacks
    for stack in spec.stacks:
        modes = recompute_modes(stack, batch)
        per_token += sum(count * block_bytes(stack, batch, mode) for mode, count in modes.items())
        per_token += _outside_blocks(stack, batch)
        recomputed = max(recomputed, _recomputed(stack, batch, modes))
    return round(batch.tokens * (per_token + recomputed))


def recompute_modes(stack: StackSpec, batch: MicroBatch) -> Mapping[RecomputeMode, int]:
    """The number of blocks in each mode (lmscale/parallel/activation_checkpointing.py)."""
    kind, _, amount = batch.recompute.partition(":")
    layers = stack.num_layers
    match kind:
        case "none" | "full" | "selective":
            return {"none": 0, "selective": 0, "full": 0, kind: layers}
        case "every":
            full = -(-layers // int(amount))  # blocks 0, N, 2N, ...
            return {"none": layers - full, "selective": 0, "full": full}
    return _within_budget(stack, batch, float(amount))


def _within_budget(
    stack: StackSpec, batch: MicroBatch, fraction: float
) -> Mapping[RecomputeMode, int]:
    """As few full, then as few selective blocks as `fraction` of the memory of `none` allows.

    lmscale/parallel/activation_checkpointing.py chooses likewise, from measured blocks.
    """
    none, selective, full = (block_bytes(stack, batch, mode) for mode in _MODES)
    limit = fraction * stack.num_layers * none
    for num_full in range(stack.num_layers + 1):
        others = stack.num_layers - num_full
        spare = limit - num_full * full - others * selective
        if spare >= 0:
            num_none = min(others, int(spare / (none - selective)))
            return {"none": num_none, "selective": others - num_none, "full": num_full}
    return {"none": 0, "selective": 0, "full": stack.num_layers}


def smallest_budget(stack: StackSpec, batch: MicroBatch) -> float:
    """What `full` saves as a share of what `none` saves: a smaller budget:FRACTION is refused at the start."""
    return block_bytes(stack, batch, "full") / block_bytes(stack, batch, "none")


def block_bytes(stack: StackSpec, batch: MicroBatch, mode: RecomputeMode) -> float:
    """What one block saves, in bytes per token."""
    match mode:
        case "none":
            return _block_whole(stack, batch)
        case "selective":
            return _block_selective(stack, batch)
    return batch.compute_bytes * _residual_elements(stack, batch)  # its input


def loss_bytes(spec: ModelSpec, batch: MicroBatch) -> int:
    """Logits of a chunk, and the gradients that head and loss compute in their one pass (lmscale/model/loss.py)."""
    return sum(_head_bytes(spec.stack(head.stack), batch) for head in spec.heads)


def _head_bytes(stack: StackSpec, batch: MicroBatch) -> int:
    vocab, width = stack.padded_vocab_size // batch.tp, stack.hidden_size
    compute, wide = batch.compute_bytes, batch.wide_bytes
    chunk = max(_CHUNK_MIN_TOKENS, _CHUNK_LOGITS[batch.device] // vocab)
    lowered = compute if compute < wide else 0  # a second copy in the compute type
    logits = min(batch.tokens, chunk) * vocab * (wide + lowered) + lowered * vocab * width
    weight = wide * vocab * width  # of the head, once accumulated and once scaled in the backward
    return weight + max(logits, weight) + 2 * compute * batch.tokens * width


def _recomputed(stack: StackSpec, batch: MicroBatch, modes: Mapping[RecomputeMode, int]) -> float:
    """Bytes per token of the block that is recomputed at the moment: all that `none` would have saved of it."""
    if modes["full"]:
        return block_bytes(stack, batch, "none")
    if modes["selective"]:
        return block_bytes(stack, batch, "none") - _saved_and_read(stack, batch)
    return 0.0


def _outside_blocks(stack: StackSpec, batch: MicroBatch) -> float:
    """Bytes per token of the last norm, the embedding's dropout and the rotary angles, shared by all layers."""
    saved = (_norm(stack, batch) if stack.final_norm else 0) + _dropout(stack, batch)
    if stack.positions == "rotary":
        saved += 2 * batch.wide_bytes * stack.block.attention.head_dim  # cosines and sines
    return saved


def _block_whole(stack: StackSpec, batch: MicroBatch) -> float:
    """Each norm, and the whole hidden states that attention and feed-forward take.

    With sequence parallelism these are gathered, and saved as the matrices' input (Megatron gathers them again).
    """
    inner = stack.block.feed_forward
    return (
        2 * (_norm(stack, batch) + batch.compute_bytes * stack.hidden_size)
        + _attention(stack, batch)
        + batch.compute_bytes * inner.properties.saved * inner.hidden_size / batch.tp
        + 2 * _dropout(stack, batch)
    )


def _block_selective(stack: StackSpec, batch: MicroBatch) -> float:
    """The input of the block, and the results of matrix products, of attention and of collectives.

    All of them, including the projections back to D, which no backward reads. The results of collectives: what
    leaves attention and feed-forward, and with sequence parallelism what they take.
    """
    inner = stack.block.feed_forward
    projections = 2 * batch.compute_bytes * stack.hidden_size
    collectives = 0.0
    if batch.tp > 1:
        collectives = 2 * batch.compute_bytes * _residual_elements(stack, batch)
        collectives += 2 * batch.compute_bytes * stack.hidden_size if batch.sequence_parallel else 0
    return (
        batch.compute_bytes * _residual_elements(stack, batch)
        + _heads(stack, batch)
        + batch.compute_bytes * inner.properties.products * inner.hidden_size / batch.tp
        + projections
        + collectives
    )


def _saved_and_read(stack: StackSpec, batch: MicroBatch) -> float:
    """What a selectively recomputed block has saved and its backward reads, which therefore exists once.

    With rotary positions q and k are recomputed from the saved products.
    """
    attention, inner = stack.block.attention, stack.block.feed_forward
    heads = _heads(stack, batch)
    if stack.positions == "rotary":
        heads -= batch.compute_bytes * (attention.query_size + attention.kv_size) / batch.tp
    products = inner.properties.products_read * inner.hidden_size / batch.tp
    gathered = 2 * batch.compute_bytes * stack.hidden_size if batch.sequence_parallel else 0
    return heads + batch.compute_bytes * products + gathered


def _attention(stack: StackSpec, batch: MicroBatch) -> float:
    """q, k, v, the result and the log-sum of each row of scores: no L x L scores, on any device.

    On a CPU separate documents are an additive mask, L elements per token, which each layer makes again. On a
    GPU they are FlexAttention's table of blocks, which is small.
    """
    mask = batch.compute_bytes * batch.seq_len if batch.separate and batch.device == "cpu" else 0
    return _heads(stack, batch) + _repeated_heads(stack, batch) + mask


def _heads(stack: StackSpec, batch: MicroBatch) -> float:
    attention = stack.block.attention
    heads = (
        batch.compute_bytes * 2 * (attention.query_size + attention.kv_size)
        + batch.wide_bytes * attention.num_heads
    )
    return heads / batch.tp


def _repeated_heads(stack: StackSpec, batch: MicroBatch) -> float:
    """CUDA's kernels for fp32 have no grouped heads: keys and values are repeated for the queries that share them."""
    attention = stack.block.attention
    if batch.device == "cpu" or batch.precision != "fp32" or batch.separate:
        return 0
    return batch.compute_bytes * 2 * (attention.query_size - attention.kv_size) / batch.tp


def _norm(stack: StackSpec, batch: MicroBatch) -> float:
    """The input and its statistics; without a fused kernel RMSNorm saves two tensors in fp32."""
    is_rms = stack.block.norm.kind == "rms"
    elements = _residual_elements(stack, batch)
    if is_rms and batch.device == "cpu":
        return 2 * batch.wide_bytes * elements + batch.wide_bytes
    return batch.compute_bytes * elements + (1 if is_rms else 2) * batch.wide_bytes


def _dropout(stack: StackSpec, batch: MicroBatch) -> float:
    """A mask of one byte per element; on a CPU of the compute type."""
    if not stack.dropout:
        return 0
    mask_bytes = 1 if batch.device == "cuda" else batch.compute_bytes
    return mask_bytes * _residual_elements(stack, batch)


def _residual_elements(stack: StackSpec, batch: MicroBatch) -> float:
    """D, or this rank's share of it where sequence parallelism splits the tokens between the layers."""
    return stack.hidden_size / batch.tp if batch.sequence_parallel else stack.hidden_size
