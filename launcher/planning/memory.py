"""Memory of one rank by formula: what its engine holds, and what a step needs besides.

tests/dist/test_plan_memory.py holds the sum against the allocator's peak in real engines. It is the sum of what each
part needs at its worst; not all parts are at their worst at the same moment, so it is a little above the peak.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.planning.activations import Work, activation_bytes, loss_bytes
from launcher.planning.held import Mesh, held_by, types_of
from launcher.planning.parameters import Parameter, total, trainable
from lmscale.config.sections import EngineConfig, ModelConfig


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
    model: ModelConfig,
    found: Sequence[Parameter],
    engine: EngineConfig,
    mesh: Mesh,
    *,
    work: Work,
    micro_batches: int,
) -> Memory:
    """The memory of a training step. `found`: the model's parameters; micro_batches: of a step on a rank."""
    held = held_by(model, found, engine, mesh, micro_batches=micro_batches, device=work.device)
    return Memory(
        held.parameters,
        held.gradients,
        held.optimizer,
        activation_bytes(model, work),
        loss_bytes(model, work),
        held.working,
        held.host,
    )


def checkpoint_bytes(found: Sequence[Parameter], model: ModelConfig, engine: EngineConfig) -> int:
    """One checkpoint on disk: weights, and two moments of what learns, in fp32 or the run's higher precision."""
    wide, _ = types_of(engine)
    return wide * (total(found) + 2 * total(trainable(model, found)))
