"""Callbacks for step, validation and checkpoint events (rank 0 only): line files, TensorBoard, progress.

metrics.jsonl has one line per step. It is written one step late, so that the loop never waits for the
device.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmscale.base.closing import Closing
from lmscale.base.errors import Diverged
from lmscale.base.records import LineFile
from lmscale.engine.step import StepResult
from lmscale.train.progress_line import ProgressLine
from lmscale.train.run_context import RunContext

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

Line = dict[str, Any]
_TRAIN_TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
}


@dataclass(frozen=True, slots=True)
class _Pending:
    step: int
    position: int
    lr: float
    seconds: float
    result: StepResult


class Recorder:
    """Turns step results into lines and passes each to the callbacks (files, TensorBoard, progress).

    Runs on every rank, because every rank counts skipped steps; only rank 0 has callbacks.
    """

    def __init__(
        self,
        callbacks: Sequence[Callable[[Line], object]],
        *,
        seq_len: int,
        max_nonfinite_steps: int,
        mfu_at: Callable[[float], float | None],
    ) -> None:
        self._callbacks = callbacks
        self._seq_len = seq_len
        self._max_nonfinite_steps = max_nonfinite_steps
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
        """Write the pending line. Raises Diverged after more than max_nonfinite_steps skips in a row."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        applied = bool(pending.result.applied.item())
        self.updates += applied
        self.skipped = 0 if applied else self.skipped + 1
        line = self._line(pending)
        self._before = pending.position
        for callback in self._callbacks:
            callback(line)
        if self.skipped > self._max_nonfinite_steps:
            raise Diverged(
                f"step {pending.step}: gradient norm {pending.result.grad_norm.item()} and loss "
                f"{pending.result.loss.item()} are not finite ({self.skipped} in a row, optim.max_nonfinite_steps is "
                f"{self._max_nonfinite_steps}); the update was not applied. Lower optim.lr, lengthen "
                "optim.warmup_steps or set optim.max_grad_norm, then start again: the run resumes from the "
                "newest checkpoint"
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


class TensorBoard(Closing):
    """Writes scalars of rank 0 to the run's tensorboard/ folder.

    An attempt that resumes from step s first purges what earlier files contain about steps after s:
    those steps are computed again, and the curves would zigzag otherwise. A failed write (a full disk)
    is logged once and ends the charts, not the run.
    """

    def __init__(self, folder: Path, *, from_step: int) -> None:
        self._writer: SummaryWriter | None = None
        self._folder = folder

        def start() -> None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=from_step + 1)

        self._attempt(start)

    def step(self, line: Mapping[str, Any]) -> None:
        """One object of metrics.jsonl."""
        for name, tag in _TRAIN_TAGS.items():
            self._scalar(tag, line.get(name), line["step"])

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """One object of eval.jsonl; each corpus gets its own chart of each metric."""
        corpus = str(line["corpus"]).strip("/") or "corpus"
        self._scalar(f"eval/{line['metric']}/{corpus}", line.get("value"), line["step"])

    def layers(self, line: Mapping[str, Any]) -> None:
        """One object of layers.jsonl; each part of the model gets its own charts."""
        for kind in ("grad_norm", "weight_norm"):
            for part, value in line[kind].items():
                self._scalar(f"layers/{kind}/{part}", value, line["step"])

    def flush(self) -> None:
        """Hand all that is queued to the file system; a process that is killed loses the rest."""
        if (writer := self._writer) is not None:
            self._attempt(writer.flush)

    def close(self) -> None:
        """Flush and stop the writer's thread."""
        if (writer := self._writer) is not None:
            self._attempt(writer.close)
            self._writer = None

    def _scalar(self, tag: str, value: object, step: int) -> None:
        if isinstance(value, (int, float)) and not math.isnan(value):
            writer = self._writer
            if writer is not None:
                self._attempt(lambda: writer.add_scalar(tag, value, step))

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._writer = None
            log.warning(
                "%s: %s; no more TensorBoard data is written in this attempt (metrics.jsonl is complete)",
                self._folder,
                error,
            )


@dataclass
class Callbacks:
    """Functions called in order; `files` are synced before a checkpoint is published."""

    recorded: list[Callable[[Line], object]] = field(default_factory=list)
    evaluated: list[Callable[[Line], object]] = field(default_factory=list)
    layers: list[Callable[[Line], object]] = field(default_factory=list)  # log.layer_stats
    saved: list[Callable[[int], None]] = field(
        default_factory=list
    )  # called with the step of a published checkpoint
    files: list[LineFile] = field(default_factory=list)
    progress: ProgressLine | None = None  # closed before the closing log lines


@contextmanager
def open_callbacks(rank: RunContext, *, total_steps: int, from_step: int) -> Iterator[Callbacks]:
    """The callbacks of this rank; empty except on rank 0. Call it after the attempt has settled."""
    callbacks = Callbacks()
    with ExitStack() as stack:
        if rank.is_root:
            metrics = stack.enter_context(cut_after(rank.folder.metrics, from_step))
            scores = stack.enter_context(cut_after(rank.folder.eval, from_step))
            callbacks.files += [metrics, scores]
            callbacks.recorded.append(metrics.append)
            callbacks.evaluated.append(scores.append)
            _open_layers(rank, callbacks, stack, from_step=from_step)
            if "tensorboard" in rank.cfg.log.trackers:
                board = TensorBoard(rank.folder.tensorboard, from_step=from_step)
                stack.enter_context(board)
                callbacks.recorded.append(board.step)
                callbacks.evaluated.append(board.evaluation)
                callbacks.layers.append(board.layers)
            line = ProgressLine(
                sys.stderr,
                total_steps,
                every_steps=rank.cfg.log.every_steps,
                saved_step=from_step or None,
            )
            _show_progress(callbacks, stack, line)
        yield callbacks


def cut_after(path: Path, step: int) -> LineFile:
    """Open a file of lines without those after `step`: an older attempt wrote them, and may still do."""
    return LineFile.cut(path, lambda line: line["step"] <= step)


def _open_layers(
    rank: RunContext, callbacks: Callbacks, stack: ExitStack, *, from_step: int
) -> None:
    """Lines of an older attempt are cut even where this one writes none."""
    path, wanted = rank.folder.layers, rank.cfg.log.layer_stats
    if wanted or path.exists():
        file = stack.enter_context(cut_after(path, from_step))
        if wanted:
            callbacks.files.append(file)
            callbacks.layers.append(file.append)


def _show_progress(callbacks: Callbacks, stack: ExitStack, progress: ProgressLine) -> None:
    callbacks.progress = stack.enter_context(closing(progress))
    for handler in logging.getLogger("lmscale").handlers:
        handler.addFilter(progress.makes_room)
        stack.callback(handler.removeFilter, progress.makes_room)

    def recorded(line: Line) -> None:
        loss = math.nan if line["loss"] is None else line["loss"]
        progress.update(line["step"], loss, line["tokens_per_s"], line["mfu"])
        if line["step"] == progress.total:
            progress.close()  # before validation and the report, which take a while

    def evaluated(line: Line) -> None:
        if line["metric"] == "bits_per_byte":
            log.info(
                "step %d: validation %.3f bits per byte (%s)",
                line["step"],
                line["value"],
                line["corpus"],
            )

    callbacks.recorded.append(recorded)
    callbacks.evaluated.append(evaluated)
    callbacks.saved.append(progress.saved)
