"""The composition root of `train`: one rank, from its command line to its exit code."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lmscale.base import log as logs
from lmscale.base.errors import ConfigError, ExitCode, LmscaleError
from lmscale.base.world import World
from lmscale.config import rules as checks
from lmscale.config.run_file import load
from lmscale.distributed.mpi_rendezvous import meet
from lmscale.run_folder.events import EventLog, start_name
from lmscale.run_folder.liveness import begin
from lmscale.run_folder.paths import RunFolder
from lmscale.run_folder.rank_progress import RankProgress
from lmscale.train.stop_request import StopRequest

log = logging.getLogger(__name__)


def main(source: str, overrides: Sequence[str], stop: StopRequest) -> ExitCode:
    """Run one rank of `lmscale train RUN.yaml [a.b=c ...]`."""
    pulse = RankProgress.inherited(os.environ)
    pulse.tick("start")
    os.environ |= meet(os.environ)
    world = World.from_env(os.environ)
    logs.configure(world)
    cfg = load(source, overrides)
    if found := list(checks.world_problems(cfg, world_size=world.size)):
        raise ConfigError(found)
    folder = RunFolder(Path(cfg.train.run_dir))
    with recorded(folder, world, os.environ) as events:
        # cuBLAS is deterministic only with this set before CUDA starts (docs of use_deterministic_algorithms).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        from lmscale.train.build import train

        code = train(cfg, world, stop, folder=folder, events=events, pulse=pulse)
        _tell_end(events, code, code.name.lower())
        return code


@contextlib.contextmanager
def recorded(folder: RunFolder, world: World, env: Mapping[str, str]) -> Iterator[EventLog | None]:
    """On rank 0 the events of this start, with its heartbeat; how it failed is written, too.

    Raises ConfigError for a start by hand on a run that is alive. A supervisor or a scheduler
    (LMSCALE_START) has judged that already.
    """
    if not world.is_root:
        yield None
        return
    fresh = env.get("LMSCALE_FRESH") == "1"
    with begin(
        folder, start_name(env), by_hand=by_hand(world, env), ranks=world.size, fresh=fresh
    ) as events:
        try:
            yield events
        except LmscaleError as error:
            _tell_end(events, error.exit_code, str(error))
            raise


def by_hand(world: World, env: Mapping[str, str]) -> bool:
    """Whether a person has started this rank: no supervisor, no scheduler, no restart by torchrun."""
    # Ranks of mpirun have named the start themselves.
    unnamed = not world.start or "LMSCALE_BY_HAND" in env
    return unnamed and env.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def _tell_end(events: EventLog | None, code: ExitCode, reason: str) -> None:
    if events is None:
        return
    try:
        events.write("exit", code=int(code), reason=reason)
    except LmscaleError as error:  # a full disk must not hide how the start ended
        log.warning("%s", error)
