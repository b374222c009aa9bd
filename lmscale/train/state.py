"""Everything that must survive a crash, besides the tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class TrainState:
    """Where a run stands. Stored as JSON in the checkpoint's manifest."""

    step: int = 0  # optimizer steps done, skipped ones included
    position: int = 0  # samples consumed, globally: the whole data cursor
    updates: int = 0  # updates that the optimizer applied (Adam's step count)
    skipped: int = 0  # steps skipped in a row for a gradient norm that was not finite
    streams: int = 0  # virtual streams of the order: resolved once, at the run's first start
    journal: list[dict[str, Any]] = field(
        default_factory=list
    )  # changes of identity keys on the way (train.allow_change): position, step, key, before, now

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "TrainState":
        """From a checkpoint's manifest."""
        return cls(**body)
