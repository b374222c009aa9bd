"""The engines by name: where each is implemented, and what configuration, planner and reports need of it.

A new engine is one module with an Engine subclass (lmscale/engine/base.py) and one row of ENGINE_KINDS.
The choices of `engine.kind` are derived from the table; nothing else lists the names. No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One row: an engine and its properties."""

    name: str  # the value of engine.kind
    module: str  # imported when the engine is built: deepspeed takes seconds
    class_name: str  # a subclass of lmscale.engine.base.Engine
    shards_parameters: bool = False  # reads dp_shard, dp_replicate and reshard_after_forward
    uses_zero_stage: bool = False  # reads zero_stage, which decides what is split over the ranks
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp64")
    offloads: tuple[str, ...] = ("none",)  # with a ZeRO stage: those of the highest stage
    offload_limit: str = "the engine keeps the whole state on each accelerator"
    offload_hint: str = "use none"
    working_memory: str = (
        "buffers"  # what `lmscale plan` calls memory that is neither state nor activations
    )
    # Its names in the gradient tests; empty: the engine's own name.
    gradient_factors: tuple[str, ...] = ()

    @property
    def splits_state(self) -> bool:
        """Whether weights, gradients or optimizer state can be split over the data-parallel ranks."""
        return self.shards_parameters or self.uses_zero_stage

    def load(self) -> Any:
        """The engine's class. Imports its module."""
        return getattr(import_module(self.module), self.class_name)


ENGINE_KINDS: Mapping[str, EngineKind] = {
    row.name: row
    for row in (
        EngineKind(
            name="fsdp",
            module="lmscale.engine.fsdp",
            class_name="FsdpEngine",
            shards_parameters=True,
            offloads=("none", "all"),
            offload_limit="fsdp moves weights, gradients and optimizer to the host together",
            offload_hint="use all, or engine.kind=deepspeed, which can move the optimizer alone",
            working_memory="gathered weights, reduction",
            gradient_factors=("fsdp", "hsdp"),
        ),
        EngineKind(
            name="ddp",
            module="lmscale.engine.ddp",
            class_name="DdpEngine",
            offload_limit="ddp keeps the whole state on each accelerator",
            offload_hint="use none, engine.kind=fsdp with offload=all, or engine.kind=deepspeed",
            working_memory="low-precision copies",
        ),
        EngineKind(
            name="deepspeed",
            module="lmscale.engine.deepspeed.engine",
            class_name="DeepSpeedEngine",
            uses_zero_stage=True,
            precisions=("fp32", "bf16", "fp16"),
            offloads=("none", "optimizer", "all", "nvme"),
            working_memory="reduction",
            gradient_factors=("zero0", "zero1", "zero2", "zero3"),
        ),
    )
}
ENGINE_NAMES: tuple[str, ...] = tuple(ENGINE_KINDS)
if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[ENGINE_NAMES]  # what the schema accepts: the names of the table


def kinds_that(**properties: bool) -> str:
    """The names of the engines with these properties, for messages: "fsdp", "ddp or deepspeed"."""
    names = [
        row.name
        for row in ENGINE_KINDS.values()
        if all(getattr(row, name) == value for name, value in properties.items())
    ]
    return " or ".join(names)
