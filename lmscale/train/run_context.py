"""What every part of one rank's start needs to know: the run file, the mesh, the run folder, the events."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from lmscale.config.schema import RunConfig
from lmscale.distributed.mesh import Mesh
from lmscale.distributed.process_group import on_root
from lmscale.run_folder.events import EventLog
from lmscale.run_folder.paths import RunFolder
from lmscale.run_folder.rank_progress import RankProgress

T = TypeVar("T")


@dataclass(frozen=True)
class RunContext:
    """One rank of one start."""

    cfg: RunConfig
    mesh: Mesh
    device: torch.device
    folder: RunFolder
    events: EventLog | None  # rank 0 only
    progress: RankProgress = field(default_factory=RankProgress)  # shared with the supervisor

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which alone writes what the run has once."""
        return self.mesh.world.is_root

    def write_event(self, kind: str, **fields: Any) -> None:
        """One line in events/START.jsonl; nothing on other ranks."""
        if self.events is not None:
            self.events.write(kind, **fields)

    def on_root(self, act: Callable[[], T]) -> T:
        """Run `act` on rank 0 only; every rank gets its value, or raises its error. Collective."""
        return on_root(act)
