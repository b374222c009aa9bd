"""TensorBoard: the lines of metrics.jsonl, eval.jsonl and layers.jsonl as scalars."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)

_TRAIN_TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
}


class TensorBoard:
    """Writes scalars of rank 0 to the run's tensorboard/ folder.

    An attempt that goes on from step s first tells TensorBoard to forget what earlier files say of
    steps after s: those steps are computed again, and the curves would zigzag otherwise. A chart is
    not worth a run: where writing fails (a full disk), this says so once and writes no more.
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

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
            _log.warning(
                "%s: %s; TensorBoard gets nothing more of this attempt (metrics.jsonl has it all)",
                self._folder,
                error,
            )
