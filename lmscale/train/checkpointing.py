"""When a checkpoint is written, what it contains besides tensors, and what a failed save does."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lmscale.base.errors import DistributedError, RetryableError
from lmscale.base.records import LineFile
from lmscale.checkpoint.retention import retain
from lmscale.checkpoint.save import save_checkpoint
from lmscale.distributed.process_group import agree
from lmscale.engine.base import Engine
from lmscale.run_folder.attempts import check_not_overtaken
from lmscale.train.restore import TrainState
from lmscale.train.run_context import RunContext

log = logging.getLogger(__name__)


class LinesLost(RetryableError):
    """Another process has replaced the line files of this attempt: no checkpoint may follow."""


class CheckpointSaver:
    """Publishes checkpoints of one attempt. Every method is collective."""

    def __init__(
        self,
        rank: RunContext,
        engine: Engine,
        *,
        attempt: int,
        body: Mapping[str, Any],
        newest_step: int | None,
    ) -> None:
        self._rank = rank
        self._engine = engine
        self.attempt = attempt
        self._body = body
        self._last_time = time.monotonic()
        self.newest_step = newest_step  # of this attempt, or the one it resumed from

    def due(self, step: int) -> bool:
        """Whether the cadence asks for a checkpoint now. Rank 0's clock decides for all, through `agree`."""
        cadence = self._rank.cfg.checkpoint
        every_steps, every_minutes = cadence.every_steps, cadence.every_minutes
        if every_steps is not None and step % every_steps == 0:
            return True
        return (
            every_minutes is not None and time.monotonic() - self._last_time >= every_minutes * 60
        )

    def try_save(self, state: TrainState, lines: Sequence[LineFile]) -> bool:
        """Write and publish; False if the save has failed.

        A failed save (a full disk, an I/O error) is a warning and an event: the run continues and
        saves again at the next occasion. Raises Overtaken when a newer attempt exists, and
        LinesLost if the line files of this one have been replaced.
        """
        begun = time.perf_counter()
        self._last_time = time.monotonic()
        moving = {"train": state.as_json(), "loss_scale": self._engine.loss_scale}
        body = {**self._body, "state": {**moving, **self._body["state"]}}
        try:
            self._rank.on_root(lambda: check_not_overtaken(self._rank.folder, self.attempt))
            self._sync(lines)
            path = save_checkpoint(
                self._rank.folder,
                self._engine.state(),
                step=state.step,
                attempt=self.attempt,
                body=body,
            )
        except (DistributedError, LinesLost):
            raise  # without a peer no step is possible; with lost lines the files would have gaps for good
        except RetryableError as error:
            if self._rank.is_root:
                log.warning("checkpoint of step %d failed: %s", state.step, error)
            self._rank.write_event("save_failed", step=state.step, reason=str(error))
            return False
        self.newest_step = state.step
        if self._rank.is_root:
            retain(self._rank.folder, keep=self._rank.cfg.checkpoint.keep, attempt=self.attempt)
        self._rank.write_event(
            "save",
            attempt=self.attempt,
            step=state.step,
            path=path.name,
            seconds=time.perf_counter() - begun,
        )
        return True

    def _sync(self, lines: Sequence[LineFile]) -> None:
        """Lines up to this step reach the disk before the checkpoint that includes them is published."""
        failure, lost = "", ""
        try:
            for file in lines:
                file.sync()
                lost = str(file.path) if file.replaced() else lost
        except OSError as error:
            failure = f"{error.filename or 'the lines of this run'}: {error.strerror}"
        agreed = agree({"failed": int(bool(failure)), "lost": int(bool(lost))})
        if agreed["lost"]:
            raise LinesLost(
                f"{lost or 'a file of another rank'} has been replaced by another process while this attempt "
                "wrote into it; start again: the run resumes from its newest checkpoint"
            )
        if agreed["failed"]:
            raise RetryableError(failure or "another rank could not write its lines")
