"""The entry of `train`: one rank, from its command line to its exit code."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lmscale.base import log as logs
from lmscale.base.errors import ConfigError, ExitCode, LmscaleError
from lmscale.base.world import World
from lmscale.config import rules as checks
from lmscale.config.run_file import load
from lmscale.distributed.mpi_rendezvous import meet
from lmscale.run_folder.events import EventLog, start_name
from lmscale.run_folder.liveness import begin_start
from lmscale.run_folder.paths import RunFolder
from lmscale.run_folder.rank_progress import STEPPING, RankProgress
from lmscale.run_folder.status_file import SUPERVISED, StatusWriter, WrittenState, state_after_exit
from lmscale.train.stop_request import StopRequest

log = logging.getLogger(__name__)


def main(source: str, overrides: Sequence[str], stop: StopRequest) -> ExitCode:
    """Train as the rank that the environment names. Raises LmscaleError with the next action."""
    progress = RankProgress.inherited(os.environ)
    progress.tick("start")
    os.environ |= meet(os.environ)
    world = World.from_env(os.environ)
    logs.configure(world)
    cfg = load(source, overrides)
    if problems := list(checks.world_problems(cfg, world_size=world.size)):
        raise ConfigError(problems)
    folder = RunFolder(Path(cfg.train.run_dir))
    with (
        recorded(folder, world, os.environ) as events,
        StatusReport.of_rank(events, folder, progress, stop, os.environ) as status,
    ):
        # cuBLAS is deterministic only with this set before CUDA starts (docs of
        # torch.use_deterministic_algorithms).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        from lmscale.train.build import train  # imports torch and the engine: seconds

        code = train(cfg, world, stop, folder=folder, events=events, progress=progress)
        _write_exit(events, code, code.name.lower())
        status.ended(code)
        return code


@contextlib.contextmanager
def recorded(folder: RunFolder, world: World, env: Mapping[str, str]) -> Iterator[EventLog | None]:
    """The events of this start with its heartbeat, on rank 0; an LmscaleError is written as its end.

    Raises ConfigError for a start by hand of a run that is alive. For other starts the supervisor or
    the scheduler (LMSCALE_START) has checked that already.
    """
    if not world.is_root:
        yield None
        return
    fresh = env.get("LMSCALE_FRESH") == "1"
    with begin_start(
        folder, start_name(env), by_hand=by_hand(world, env), ranks=world.size, fresh=fresh
    ) as events:
        try:
            yield events
        except LmscaleError as error:
            _write_exit(events, error.exit_code, str(error))
            raise


class StatusReport:
    """Keeps RUN/status.json up to date, on rank 0 of a start without a supervisor; else does nothing.

    As a context manager: it writes at each change of state and with each heartbeat.
    """

    def __init__(
        self,
        events: EventLog | None,
        folder: RunFolder,
        progress: RankProgress,
        stop: StopRequest,
        *,
        scheduled: bool,
    ) -> None:
        self._events = events
        self._folder = folder
        self._progress = progress
        self._stop = stop
        self._scheduled = scheduled
        self._writer = StatusWriter(folder, events.start) if events is not None else None

    @classmethod
    def of_rank(
        cls,
        events: EventLog | None,
        folder: RunFolder,
        progress: RankProgress,
        stop: StopRequest,
        env: Mapping[str, str],
    ) -> Self:
        """The report of this rank. A supervisor that shares memory with it writes the file itself."""
        supervised = env.get(SUPERVISED) == "1" or progress.is_shared
        scheduled = "LMSCALE_START" in env
        return cls(None if supervised else events, folder, progress, stop, scheduled=scheduled)

    def ended(self, code: int, reason: str = "") -> None:
        """Write the last state of this start."""
        if self._writer is None or not self._detach():
            return
        # The exit code is decided: a file system that fails now must not change it.
        with contextlib.suppress(OSError, LmscaleError):
            state, phrase = state_after_exit(self._folder, code, scheduled=self._scheduled)
            self._writer.update(
                state, step=self._progress.reading.steps_done, reason=reason or phrase
            )

    def _detach(self) -> bool:
        """Stop the updates; False where they have been stopped before."""
        attached = self._progress.observer is not None
        self._progress.observer = None
        if self._events is not None:
            self._events.on_beat = lambda: None
        return attached

    def _update(self) -> None:
        assert self._writer is not None
        state, step, reason = self._status()
        self._writer.update(state, step=step, reason=reason)

    def _observe(self) -> None:
        assert self._writer is not None
        state, step, reason = self._status()
        self._writer.update_if_changed(state, step=step, reason=reason)

    def _status(self) -> tuple[WrittenState, int | None, str]:
        reading, reason = self._progress.reading, self._stop.reason
        begun = reading.warm or reading.phase in STEPPING
        state: WrittenState = "saving" if reason else "running" if begun else "starting"
        return state, reading.steps_done, reason

    def __enter__(self) -> Self:
        if self._events is not None:
            self._progress.observer, self._events.on_beat = self._observe, self._update
            self._update()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, LmscaleError):
            self.ended(error.exit_code, str(error).partition("\n")[0])
        elif error is not None:
            self.ended(ExitCode.BUG, f"internal error: {type(error).__name__}")


def by_hand(world: World, env: Mapping[str, str]) -> bool:
    """Whether a person has started this rank: no supervisor, no scheduler, no restart by torchrun."""
    # Ranks of mpirun have named the start themselves.
    unnamed = not world.start or "LMSCALE_BY_HAND" in env
    return unnamed and env.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def _write_exit(events: EventLog | None, code: ExitCode, reason: str) -> None:
    if events is None:
        return
    try:
        events.write("exit", code=int(code), reason=reason)
    except LmscaleError as error:  # a full disk must not hide how the start ended
        log.warning("%s", error)
