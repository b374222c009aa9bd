"""The loop owns time: which step is next, when to validate, save and stop. The engine owns the step."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from lmscale.base.errors import ExitCode
from lmscale.base.records import LineFile
from lmscale.corpus.order import Order
from lmscale.data.loader import Loader, StepBatch, trace_lines
from lmscale.distributed.process_group import agree, to_device
from lmscale.distributed.seeds import seed_step
from lmscale.engine.base import Engine
from lmscale.optim.learning_rate import lr_at
from lmscale.train.callbacks import Callbacks, Line, Recorder
from lmscale.train.checkpointing import CheckpointSaver
from lmscale.train.evaluation import Validation
from lmscale.train.layer_stats import LayerStats, LossScaleRecorder
from lmscale.train.profile import Profile
from lmscale.train.replicas import Replicas
from lmscale.train.restore import TrainState
from lmscale.train.run_context import RunContext
from lmscale.train.stop_request import StopRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """The file in which this rank records its samples."""

    file: LineFile
    attempt: int
    order: Order
    dtype: np.dtype[Any]

    def write(self, batch: StepBatch, *, step: int) -> None:
        """One line per sample."""
        for line in trace_lines(
            batch, step=step, attempt=self.attempt, order=self.order, dtype=self.dtype
        ):
            self.file.append(line)


@dataclass
class TrainLoop:
    """One attempt of a run, from its state to its end. Methods are collective: every rank calls each."""

    rank: RunContext
    engine: Engine
    loader: Loader
    state: TrainState
    total_steps: int
    recorder: Recorder
    layers: LayerStats
    scale: LossScaleRecorder
    replicas: Replicas
    validation: Validation
    saver: CheckpointSaver
    stop: StopRequest
    callbacks: Callbacks
    trace: Trace | None
    profile: Profile
    scores: list[Line] = field(default_factory=list)  # of the last validation
    _evaluated: int = -1  # its step
    _stop_seen: float = 0.0

    def fit(self) -> ExitCode:
        """Train to the last step, to train.stop_at, or to a request to stop. The state is saved in all three."""
        stop_at = self.rank.cfg.train.stop_at
        last = self.total_steps if stop_at is None else min(stop_at, self.total_steps)
        self.recorder.resume(
            position=self.state.position, updates=self.state.updates, skipped=self.state.skipped
        )
        with closing(self.loader.steps(self.state.position)) as batches:
            asked = agree({"stop": self._stop_asked(), "save": 0})
            while self.state.step < last and not asked["stop"]:
                self.rank.progress.tick("data", self.state.step + 1)
                batch = next(batches)
                self.rank.progress.tick("step")
                self._step(batch)
                due = self.rank.is_root and self.saver.due(self.state.step)
                asked = agree({"stop": self._stop_asked(), "save": int(due)})
                if self._eval_due():
                    self.evaluate()
                if asked["save"] and self.state.step < last:
                    self.save_step()
        self._flush()
        if self.state.step >= self.total_steps:
            return ExitCode.DONE
        if not self.save_step():
            return ExitCode.RETRY
        return ExitCode.SAVED if self.state.step < last else ExitCode.DONE

    def _step(self, batch: StepBatch) -> None:
        step = self.state.step + 1
        lr = lr_at(step, self.rank.cfg.optim, self.total_steps)
        self.profile.before(step)
        self._seed(step)
        convert = partial(to_device, device=self.rank.device)
        result = self.engine.step([convert(micro) for micro in batch.micro_batches], lr=lr)
        if self.trace is not None:
            self.trace.write(batch, step=step)
        self.state.step = step
        self.state.position = batch.position + self.rank.cfg.train.global_batch_size
        self.recorder.note(step=step, position=self.state.position, lr=lr, result=result)
        self.layers.note(step=step, result=result)
        self.scale.after_step(step)
        self.replicas.after_step(step)
        if self.profile.recording:
            self.rank.progress.tick("save")  # writing a trace may take minutes
        if path := self.profile.after(step):
            log.info("profile of steps up to %d: %s", step, path)

    def _seed(self, step: int) -> None:
        """Draws of this step, for dropout.

        Exact masks (train.deterministic) are functions of where an element is, so all ranks share one seed. Otherwise
        data-parallel ranks draw apart, and tensor-parallel ones only where each holds tokens of its own: elsewhere
        all of them hold the whole residual stream and must mask it alike.
        """
        cfg, mesh = self.rank.cfg, self.rank.mesh
        exact = cfg.train.deterministic
        seed_step(
            cfg.train.seed,
            step=step,
            dp_rank=0 if exact else mesh.dp_rank,
            tp_rank=mesh.tp_rank if cfg.parallel.sequence_parallel and not exact else 0,
        )

    def _flush(self) -> None:
        """Write the pending lines."""
        self.recorder.flush()
        self.layers.flush()

    def evaluate(self) -> None:
        """Validate now, unless this step has been validated."""
        if self._evaluated == self.state.step:
            return
        self.rank.progress.tick("eval")
        with self._paused():
            self._flush()
            self.scores = self.validation.score(self.engine, self.rank, step=self.state.step)
            self._evaluated = self.state.step
            self.announce(self.scores)

    def announce(self, lines: Sequence[Line]) -> None:
        """Pass validation lines to the callbacks."""
        for line in lines:
            for callback in self.callbacks.evaluated:
                callback(line)

    def save_step(self) -> bool:
        """Publish a checkpoint of this step unless there is one; False if the save has failed."""
        if self.saver.newest_step == self.state.step:
            return True
        self.rank.progress.tick("save")
        with self._paused():
            self._flush()
            self.replicas.before_save(self.state.step)
            self.state.updates, self.state.skipped = self.recorder.updates, self.recorder.skipped
            if not self.saver.try_save(self.state, self.callbacks.files):
                return False
        for callback in self.callbacks.saved:
            callback(self.state.step)
        return True

    def _eval_due(self) -> bool:
        every = self.rank.cfg.eval.every_steps
        return every is not None and self.state.step % every == 0

    def _stop_asked(self) -> int:
        """The signal that asks this rank to stop; rank 0 also looks for RUN/stop, every five seconds."""
        if self.stop.signal is not None:
            return int(self.stop.signal)
        now = time.monotonic()
        if self.rank.is_root and now - self._stop_seen > 5:
            self._stop_seen = now
            if self.rank.folder.stop.exists():
                self.stop.stop_file_found = True
                return 1
        return 0

    @contextmanager
    def _paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.recorder.pause(time.perf_counter() - begun)
