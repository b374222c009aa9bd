"""The composition root of `train`: builds the parts of one rank and hands them to the loop."""

import argparse
import contextlib
import os
from pathlib import Path

from lmscale import log as logs
from lmscale.config import checks
from lmscale.config.load import dump, load
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, ExitCode, LmscaleError, Problem
from lmscale.run import liveness
from lmscale.run.events import EventLog, start_name
from lmscale.run.folder import RunFolder
from lmscale.train.signals import StopRequest
from lmscale.world import World


def main(argv: list[str], stop: StopRequest) -> ExitCode:
    """One rank of `lmscale train RUN.yaml [a.b=c ...]`; a world of one without RANK."""
    parser = argparse.ArgumentParser(prog="python -m lmscale train")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args(argv)
    world = World.from_env(os.environ)
    logs.configure(world)
    cfg = load(args.run, args.overrides)
    if found := list(checks.world_problems(cfg, world_size=world.size)):
        raise ConfigError(found)
    folder = RunFolder(Path(cfg.train.run_dir))
    refuse_live(folder, world)
    # cuBLAS is deterministic only with this set before CUDA starts (docs of use_deterministic_algorithms).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from lmscale.train.assemble import train

    with contextlib.ExitStack() as stack:
        events = None
        if world.is_root:
            events = stack.enter_context(EventLog(folder, start_name(os.environ)))
            events.write("start", ranks=world.size, by_hand=not world.start)
        try:
            code = train(cfg, world, stop, folder=folder, events=events)
        except LmscaleError as error:
            if events is not None:
                events.write("exit", code=int(error.exit_code), reason=str(error))
            raise
        if events is not None:
            events.write("exit", code=int(code), reason=code.name.lower())
        return code


def refuse_live(folder: RunFolder, world: World) -> None:
    """Refuse to start by hand on a run that is alive. A supervisor or scheduler (LMSCALE_START) has judged already."""
    if world.start or not world.is_root:
        return
    live = liveness.live(folder)
    if live is not None:
        raise ConfigError(
            [
                Problem(
                    "train.run_dir",
                    f"{folder.path} is being trained by pid {live.pid} on {live.host} (attempt {live.attempt}, "
                    f"heard {live.age_s:.0f} s ago)",
                    f"wait for it, stop it with `lmscale stop {folder.path}`, or choose another train.run_dir",
                )
            ]
        )


def write_config(folder: RunFolder, cfg: RunConfig) -> None:
    """The resolved run file, written whole or not at all."""
    folder.path.mkdir(parents=True, exist_ok=True)
    scratch = folder.config.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(dump(cfg), encoding="utf-8")
    scratch.replace(folder.config)
