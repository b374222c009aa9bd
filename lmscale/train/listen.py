"""Who hears of a step or a validation on rank 0: the line files, TensorBoard, the progress line."""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lmscale.run.lines import LineFile
from lmscale.train.boards import TensorBoard
from lmscale.train.progress import Progress
from lmscale.train.rank import Rank
from lmscale.train.record import Line

log = logging.getLogger(__name__)


@dataclass
class Listeners:
    """Called in order; `files` are what a checkpoint waits for."""

    recorded: list[Callable[[Line], object]] = field(default_factory=list)
    evaluated: list[Callable[[Line], object]] = field(default_factory=list)
    layers: list[Callable[[Line], object]] = field(default_factory=list)  # log.layer_stats
    saved: list[Callable[[int], None]] = field(
        default_factory=list
    )  # the step of a checkpoint that stands
    files: list[LineFile] = field(default_factory=list)
    progress: Progress | None = None  # closed before the words about how it ended


@contextmanager
def open_listeners(rank: Rank, *, total_steps: int, from_step: int) -> Iterator[Listeners]:
    """The listeners of this rank: none but on rank 0. Open them once the attempt has settled."""
    ears = Listeners()
    with ExitStack() as stack:
        if rank.is_root:
            metrics = stack.enter_context(cut_after(rank.folder.metrics, from_step))
            scores = stack.enter_context(cut_after(rank.folder.eval, from_step))
            ears.files += [metrics, scores]
            ears.recorded.append(metrics.append)
            ears.evaluated.append(scores.append)
            _open_layers(rank, ears, stack, from_step=from_step)
            if "tensorboard" in rank.cfg.log.trackers:
                board = TensorBoard(rank.folder.tensorboard, from_step=from_step)
                stack.enter_context(board)
                ears.recorded.append(board.step)
                ears.evaluated.append(board.evaluation)
                ears.layers.append(board.layers)
            line = Progress(
                sys.stderr,
                total_steps,
                every_steps=rank.cfg.log.every_steps,
                saved_step=from_step or None,
            )
            _show_progress(ears, stack, line)
        yield ears


def cut_after(path: Path, step: int) -> LineFile:
    """Open a file of lines without those after `step`: an older attempt wrote them, and may still do."""
    return LineFile.cut(path, lambda line: line["step"] <= step)


def _open_layers(rank: Rank, ears: Listeners, stack: ExitStack, *, from_step: int) -> None:
    """Lines of an older attempt are cut even where this one writes none."""
    path, wanted = rank.folder.layers, rank.cfg.log.layer_stats
    if wanted or path.exists():
        file = stack.enter_context(cut_after(path, from_step))
        if wanted:
            ears.files.append(file)
            ears.layers.append(file.append)


def _show_progress(ears: Listeners, stack: ExitStack, progress: Progress) -> None:
    ears.progress = stack.enter_context(closing(progress))
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

    ears.recorded.append(recorded)
    ears.evaluated.append(evaluated)
    ears.saved.append(progress.saved)
