"""One line a step in metrics.jsonl, written one step late so that the loop never waits for the device."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmscale.engine.protocol import StepResult
from lmscale.errors import Diverged

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Pending:
    step: int
    position: int
    lr: float
    seconds: float
    result: StepResult


class Recorder:
    """Turns step results into lines and passes each to the listeners (files, TensorBoard, progress).

    Runs on every rank, for every rank must see a skipped step; only rank 0 has listeners.
    """

    def __init__(
        self,
        listeners: Sequence[Callable[[Line], object]],
        *,
        seq_len: int,
        max_skips: int,
        mfu_at: Callable[[float], float | None],
    ) -> None:
        self._listeners = listeners
        self._seq_len = seq_len
        self._max_skips = max_skips
        self._mfu_at = mfu_at
        self._pending: _Pending | None = None
        self._since = time.perf_counter()
        self._before = 0
        self.skipped = 0  # in a row
        self.updates = 0  # applied

    def resume(self, *, position: int, updates: int, skipped: int) -> None:
        """Start counting from here; the clock starts now."""
        self._before, self.updates, self.skipped = position, updates, skipped
        self._since = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (an evaluation, a checkpoint) out of the next step's time."""
        self._since += seconds

    def note(self, *, step: int, position: int, lr: float, result: StepResult) -> None:
        """Take a step's result and write the line of the step before."""
        now = time.perf_counter()
        self.flush()
        self._pending = _Pending(step, position, lr, now - self._since, result)
        self._since = now

    def flush(self) -> None:
        """Write the line that is still owed. Raises Diverged after more than max_skips skips in a row."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        applied = bool(pending.result.applied.item())
        self.updates += applied
        self.skipped = 0 if applied else self.skipped + 1
        line = self._line(pending)
        self._before = pending.position
        for listener in self._listeners:
            listener(line)
        if self.skipped > self._max_skips:
            raise Diverged(
                f"step {pending.step}: gradient norm {pending.result.grad_norm.item()} and loss "
                f"{pending.result.loss.item()} are not finite ({self.skipped} in a row, optim.max_skips is "
                f"{self._max_skips}); the update was not applied. Lower optim.lr, lengthen "
                "optim.warmup_steps or set optim.clip, then start again: it goes on from the newest checkpoint"
            )

    def _line(self, pending: _Pending) -> Line:
        tokens = (pending.position - self._before) * self._seq_len
        rate = tokens / pending.seconds if pending.seconds > 0 else None
        return {
            "step": pending.step,
            "loss": _finite(pending.result.loss.item()),
            "tokens": pending.position * self._seq_len,
            "position": pending.position,
            "lr": pending.lr,
            "grad_norm": _finite(pending.result.grad_norm.item()),
            "tokens_per_s": rate,
            "mfu": None if rate is None else self._mfu_at(rate),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
