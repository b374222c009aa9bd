"""Memory of one rank by formula: what each engine holds, and what a step needs besides.

tests/dist/test_plan_memory.py holds parameters, gradients and optimizer state against real engines of one and
two ranks, byte for byte, and the sum against the allocator's peak. It is the sum of what each part needs at its
worst; not all parts are at their worst at the same moment, so it is a little above the peak.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from launcher.planning.activations import BYTES, Work, activation_bytes, loss_bytes
from launcher.planning.parameters import Parameter, total, trainable
from lmscale.config.sections import EngineConfig, ModelConfig

_ZERO_BUCKET = 1 << 24  # engine/zero_dict.py: elements of one reduction
_STEP_COUNT = 4  # Adam counts its updates in one fp32 number a tensor


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes of the axes, outermost first."""

    replicate: int
    shard: int
    tp: int

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.replicate * self.shard


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the fullest rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int  # logits of a chunk, and the head's gradient
    working: int  # gathered weights, low-precision copies, buffers of reductions

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Held:
    """What an engine holds, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    working: int


def memory_of(
    model: ModelConfig,
    found: Sequence[Parameter],
    engine: EngineConfig,
    mesh: Mesh,
    *,
    work: Work,
    micro_batches: int,
) -> Memory:
    """The memory of a training step. `found`: the model's parameters; micro_batches: of a step on a rank."""
    held = held_by(model, found, engine, mesh, micro_batches=micro_batches)
    return Memory(
        held.parameters,
        held.gradients,
        held.optimizer,
        activation_bytes(model, work),
        loss_bytes(model, work),
        held.working,
    )


def held_by(
    model: ModelConfig,
    found: Sequence[Parameter],
    engine: EngineConfig,
    mesh: Mesh,
    *,
    micro_batches: int,
) -> Held:
    """What the engine holds on its fullest rank."""
    here = [parameter.slice_of(mesh.tp) for parameter in found]
    learning = trainable(model, here)
    match engine.kind:
        case "fsdp":
            return _fsdp(here, learning, engine, mesh.shard, accumulates=micro_batches > 1)
        case "ddp":
            return _ddp(here, learning, engine, mesh.dp, accumulates=micro_batches > 1)
    return _zero(here, learning, engine, mesh.dp)


def _fsdp(
    here: Sequence[Parameter],
    learning: Sequence[Parameter],
    engine: EngineConfig,
    ranks: int,
    *,
    accumulates: bool,
) -> Held:
    """Weights, gradients and moments are cut along dim 0, in fp32.

    While a step has more than one micro-batch, gradients add up whole, in fp32 (engine/fsdp.py reduces once a
    step). The group of embedding and head stays gathered from forward to backward; of the blocks, one is in
    use and the next on its way, and one is being reduced.
    """
    wide, compute = _types(engine)
    kept = _sharded(learning, ranks)
    block = max(_by_block(here), default=0)
    root = total(parameter for parameter in here if not parameter.in_block)
    whole = total(here)
    gathered = min(whole, root + 2 * block) if engine.reshard_after_forward else whole
    return Held(
        parameters=wide * _sharded(here, ranks),
        gradients=wide * (total(learning) if accumulates else kept),
        optimizer=2 * wide * kept + _STEP_COUNT * len(learning),
        working=compute * (gathered + root + block) + wide * block,
    )


def _ddp(
    here: Sequence[Parameter],
    learning: Sequence[Parameter],
    engine: EngineConfig,
    ranks: int,
    *,
    accumulates: bool,
) -> Held:
    """All of it on every rank, in fp32; with bf16 a low-precision copy of the weights for each micro-batch.

    Several ranks: gradients are views of DDP's buckets. Those of micro-batches that are not reduced yet
    stand beside the buckets, so accumulation doubles them.
    """
    wide, compute = _types(engine)
    learned = total(learning)
    copies = compute * total(here) if compute < wide else 0
    return Held(
        parameters=wide * total(here),
        gradients=wide * learned * (2 if ranks > 1 and accumulates else 1),
        optimizer=2 * wide * learned + _STEP_COUNT * len(learning),
        working=copies + compute * _largest(learning),
    )


def _zero(
    here: Sequence[Parameter], learning: Sequence[Parameter], engine: EngineConfig, ranks: int
) -> Held:
    """ZeRO-2 (arXiv:1910.02054, section 5.2): whole weights; masters, moments and gradients in parts.

    Two flat groups, those that decay and those that do not, each padded to a multiple of 2 x ranks (DeepSpeed
    0.19, stage_1_and_2.py). Where weights are fp32 already DeepSpeed flattens the gradients into a second copy
    for the update.
    """
    wide, compute = _types(engine)
    groups = [
        total(p for p in learning if len(p.shape) >= 2),
        total(p for p in learning if len(p.shape) < 2),
    ]
    flat = [-(-size // (2 * ranks)) * 2 * ranks for size in groups if size]
    part = sum(flat) // ranks
    frozen = total(here) - total(learning)
    bucket = min(_ZERO_BUCKET, total(here))
    return Held(
        parameters=compute * (sum(flat) + frozen),
        gradients=wide * part * (1 if compute < wide else 2),
        optimizer=3 * wide * part + _STEP_COUNT * len(flat),
        working=2 * wide * bucket + compute * _largest(learning),
    )


def _types(engine: EngineConfig) -> tuple[int, int]:
    """Bytes of masters, gradients and moments, and of what forward and backward compute with."""
    compute = BYTES[engine.precision]
    return max(4, compute), compute


def _sharded(found: Iterable[Parameter], ranks: int) -> int:
    """Elements of the first of `ranks` ranks: rows are dealt out evenly, rounded up."""
    return sum(-(-p.shape[0] // ranks) * (p.size // p.shape[0]) for p in found)


def _by_block(found: Iterable[Parameter]) -> Iterable[int]:
    sizes: dict[str, int] = {}
    for parameter in found:
        if parameter.in_block:
            number = parameter.name.split(".", 3)[2]
            sizes[number] = sizes.get(number, 0) + parameter.size
    return sizes.values()


def _largest(found: Iterable[Parameter]) -> int:
    return max((parameter.size for parameter in found), default=0)


def checkpoint_bytes(found: Sequence[Parameter], model: ModelConfig, engine: EngineConfig) -> int:
    """One checkpoint on disk: weights, and two moments of what learns, in fp32 or the run's higher precision."""
    wide, _ = _types(engine)
    return wide * (total(found) + 2 * total(trainable(model, found)))
