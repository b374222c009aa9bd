"""Memory of one rank by formula: what its engine stores, and what a step needs besides.

tests/distributed/test_plan_memory.py compares weights, gradients and optimizer with real engines of one, two and
four ranks, byte for byte, and the total with the peak of the allocator. The total is the sum of what each part
needs at its worst; not all parts are at their worst at the same moment, so it is a little above the peak.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lmscale.config.schema import EngineConfig
from lmscale.modelspec.activations import BYTES, Device, MicroBatch, activation_bytes, loss_bytes
from lmscale.modelspec.parameters import ParameterSpec, num_elements, parameters, trainable
from lmscale.modelspec.spec import ModelSpec

# engine/zero_dict.py, in elements: of one reduction; of what stage 3 gathers ahead, and of what it leaves whole.
_ZERO_BUCKET, _ZERO_LIVE, _ZERO_WHOLE = 1 << 24, 10**9, 100_000
_STEP_COUNT = 4  # Adam counts its updates in one fp32 number a tensor


@dataclass(frozen=True, slots=True)
class MeshSizes:
    """Sizes of the axes, outermost first."""

    replicate: int
    shard: int
    tp: int

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.replicate * self.shard


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """What an engine holds on its fullest rank, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    working: int  # gathered weights, low-precision copies, buffers of reductions
    host: int = 0  # what offloading has moved off the accelerator


def held_by(
    spec: ModelSpec,
    engine: EngineConfig,
    mesh: MeshSizes,
    *,
    micro_batches: int,
    device: Device = "cpu",
) -> HeldMemory:
    """On a device that is the host itself, nothing moves."""
    here = [parameter.tp_slice(mesh.tp) for parameter in parameters(spec)]
    learning = trainable(here)
    if engine.traits.shards_parameters:
        held = _fsdp(here, learning, engine, mesh.shard, accumulates=micro_batches > 1)
    elif engine.traits.uses_zero_stage:
        held = _zero(here, learning, engine, mesh.dp)
    else:
        held = _ddp(here, learning, engine)
    return _moved(held, engine.offload) if device == "cuda" else held


def _moved(held: HeldMemory, offload: str) -> HeldMemory:
    """Gradients leave with the optimizer that reads them."""
    match offload:
        case "none":
            return held
        case "optimizer":
            moved = held.gradients + held.optimizer
            return replace(held, gradients=0, optimizer=0, host=moved)
    moved = held.parameters + held.gradients + held.optimizer
    return HeldMemory(0, 0, 0, held.working, host=moved)


def _fsdp(
    here: Sequence[ParameterSpec],
    learning: Sequence[ParameterSpec],
    engine: EngineConfig,
    ranks: int,
    *,
    accumulates: bool,
) -> HeldMemory:
    """Weights, gradients and moments are cut along dim 0 over the shard ranks, in fp32.

    Every micro-batch is reduced (engine/fsdp.py), so no gradient stands whole. The group of embedding and head
    stays gathered from forward to backward; of the blocks, one is in use and the next on its way, and one is
    being reduced; of several micro-batches its new shard stands beside the old one.
    """
    wide, compute = types_of(engine)
    kept = _sharded(learning, ranks)
    block = max(_by_block(here), default=0)
    root = num_elements(parameter for parameter in here if parameter.block is None)
    whole = num_elements(here)
    gathered = min(whole, root + 2 * block) if engine.reshard_after_forward else whole
    return HeldMemory(
        parameters=wide * _sharded(here, ranks),
        gradients=wide * kept,
        optimizer=2 * wide * kept + _STEP_COUNT * len(learning),
        working=compute * (gathered + root + block) + wide * (block + accumulates * block // ranks),
    )


def _ddp(
    here: Sequence[ParameterSpec], learning: Sequence[ParameterSpec], engine: EngineConfig
) -> HeldMemory:
    """All of it on every rank, in fp32; with bf16 a low-precision copy of the weights for each micro-batch.

    Several ranks: gradients are views of DDP's buckets, where those of several micro-batches add up.
    """
    wide, compute = types_of(engine)
    learned = num_elements(learning)
    copies = compute * num_elements(here) if compute < wide else 0
    return HeldMemory(
        parameters=wide * num_elements(here),
        gradients=wide * learned,
        optimizer=2 * wide * learned + _STEP_COUNT * len(learning),
        working=copies + compute * _largest(learning),
    )


def _zero(
    here: Sequence[ParameterSpec],
    learning: Sequence[ParameterSpec],
    engine: EngineConfig,
    ranks: int,
) -> HeldMemory:
    """ZeRO (arXiv:1910.02054, section 5): 1 cuts masters and moments, 2 gradients too, 3 weights too."""
    match engine.zero_stage:
        case 0:  # DeepSpeed only averages; the rest is as in ddp, averaging included
            return _ddp(here, learning, engine)
        case 3:
            return _zero_3(here, learning, engine, ranks)
    return _zero_flat(here, learning, engine, ranks)


def _zero_flat(
    here: Sequence[ParameterSpec],
    learning: Sequence[ParameterSpec],
    engine: EngineConfig,
    ranks: int,
) -> HeldMemory:
    """Stages 1 and 2: whole weights; masters and moments in parts; gradients whole in stage 1.

    Two flat groups, those that decay and those that do not, each padded to a multiple of 2 x ranks (DeepSpeed
    0.19, stage_1_and_2.py). Where weights are fp32 already DeepSpeed flattens the gradients into a second copy
    for the update.
    """
    wide, compute = types_of(engine)
    groups = [
        num_elements(p for p in learning if p.decays),
        num_elements(p for p in learning if not p.decays),
    ]
    flat = [-(-size // (2 * ranks)) * 2 * ranks for size in groups if size]
    part = sum(flat) // ranks
    frozen = num_elements(here) - num_elements(learning)
    bucket = min(_ZERO_BUCKET, num_elements(here))
    gradients = part * (1 if compute < wide else 2)
    if engine.zero_stage == 1:
        gradients = max(sum(flat), gradients)
    return HeldMemory(
        parameters=compute * (sum(flat) + frozen),
        gradients=wide * gradients,
        optimizer=3 * wide * part + _STEP_COUNT * len(flat),
        working=2 * wide * bucket + compute * _largest(learning),
    )


def _zero_3(
    here: Sequence[ParameterSpec],
    learning: Sequence[ParameterSpec],
    engine: EngineConfig,
    ranks: int,
) -> HeldMemory:
    """A part of every parameter, rounded up; norms and biases whole besides (engine/zero_dict.py).

    What a module reads is gathered for it, and what comes next up to an eighth of the model. Gradients lie in one
    flat buffer, and DeepSpeed copies them out of it for the update (0.19, stage3.py).
    """
    wide, compute = types_of(engine)
    part = sum(-(-p.size // ranks) for p in learning)
    size = num_elements(here)
    small = sum(p.size for p in here if p.size <= min(_ZERO_WHOLE, size // 512))
    bucket = min(_ZERO_BUCKET, size)
    gathered = max(_largest(here), min(_ZERO_LIVE, size // 8))
    groups = len({p.decays for p in learning})
    return HeldMemory(
        parameters=compute * sum(-(-p.size // ranks) for p in here),
        gradients=2 * wide * part,
        optimizer=3 * wide * part + _STEP_COUNT * groups,
        working=compute * (small + gathered) + 2 * wide * bucket,
    )


def types_of(engine: EngineConfig) -> tuple[int, int]:
    """Bytes of masters, gradients and moments, and of what forward and backward compute with."""
    compute = BYTES[engine.precision]
    return max(4, compute), compute


def _sharded(found: Iterable[ParameterSpec], ranks: int) -> int:
    """Elements of the first of `ranks` ranks: rows are dealt out evenly, rounded up."""
    return sum(-(-p.shape[0] // ranks) * (p.size // p.shape[0]) for p in found)


def _by_block(found: Iterable[ParameterSpec]) -> Iterable[int]:
    sizes: dict[str, int] = {}
    for parameter in found:
        if parameter.block is not None:
            sizes[parameter.block] = sizes.get(parameter.block, 0) + parameter.size
    return sizes.values()


def _largest(found: Iterable[ParameterSpec]) -> int:
    return max((parameter.size for parameter in found), default=0)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the fullest rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int  # logits of a chunk, and the head's gradient
    working: int  # gathered weights, low-precision copies, buffers of reductions
    host: int = 0  # what engine.offload has moved off the accelerator

    @property
    def total(self) -> int:
        """All that is on the device of the computation."""
        held = self.parameters + self.gradients + self.optimizer
        return held + self.activations + self.loss + self.working


def memory_of(
    spec: ModelSpec,
    engine: EngineConfig,
    mesh: MeshSizes,
    *,
    batch: MicroBatch,
    micro_batches: int,
) -> Memory:
    """The memory of a training step. micro_batches: of a step on a rank."""
    held = held_by(spec, engine, mesh, micro_batches=micro_batches, device=batch.device)
    return Memory(
        held.parameters,
        held.gradients,
        held.optimizer,
        activation_bytes(spec, batch),
        loss_bytes(spec, batch),
        held.working,
        held.host,
    )


def checkpoint_bytes(spec: ModelSpec, engine: EngineConfig) -> int:
    """One checkpoint on disk: weights, and two moments of what learns, in fp32 or the run's higher precision."""
    wide, _ = types_of(engine)
    tensors = parameters(spec)
    return wide * (num_elements(tensors) + 2 * num_elements(trainable(tensors)))
