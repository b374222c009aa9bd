"""`log.profile`: a torch profiler trace, and on CUDA a memory snapshot, of chosen steps."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lmscale.base.closing import Closing
from lmscale.train.run_context import RunContext


def profile_of(rank: RunContext) -> "Profile":
    """The profile that log.profile asks for, on rank 0; elsewhere one that records nothing."""
    wanted = rank.cfg.log.profile
    first, last = 0, 0
    if wanted is not None and rank.is_root:
        first, last = (int(step) for step in wanted.steps.split(":"))
    return Profile(rank.folder.logs, first=first, last=last, device=rank.device)


class Profile(Closing):
    """Records steps first..last (both included; steps count from 1) into RUN/logs/profile-STEP-*.json.

    The trace opens in Perfetto or chrome://tracing, the snapshot in pytorch.org/memory_viz.
    """

    def __init__(self, folder: Path, *, first: int, last: int, device: torch.device) -> None:
        self._folder = folder
        self._first = first
        self._last = last
        self._cuda = device.type == "cuda"
        self._profiler: Any = None

    @property
    def recording(self) -> bool:
        """Whether the steps of now are recorded."""
        return self._profiler is not None

    def before(self, step: int) -> None:
        """Call before each step."""
        if step != self._first:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.__enter__()
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=200_000)

    def after(self, step: int) -> Path | None:
        """Call after each step; the path of the trace once it is written."""
        if self._profiler is None or step < self._last:
            return None
        self.close()
        return self._path("trace.json")

    def _path(self, name: str) -> Path:
        return self._folder / f"profile-{self._first}-{self._last}-{name}"

    def close(self) -> None:
        """Write what was recorded, also when the run ends inside the chosen steps."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._path("trace.json")))
        if self._cuda:
            torch.cuda.memory._dump_snapshot(str(self._path("memory.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
