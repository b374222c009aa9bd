"""Staging: copy the chunks that the ranks of a node will read to the disk of the node, before the ranks start.

    lmscale stage RUN.yaml [a.b=c ...] --node 0 --nodes 2 --ranks-per-node 8

The exit code is 0 also where the cache could not be filled: it only saves time. 78, 65 and 75 mean the same as for
a rank, and 85 that a signal has ended the staging; chunks that are staged by then are kept.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmscale.base import log as logs
from lmscale.base.console import byte_progress
from lmscale.base.errors import ConfigError, ExitCode, LmscaleError, Problem
from lmscale.base.units import show_bytes, show_seconds
from lmscale.base.world import World
from lmscale.config import rules as checks
from lmscale.config.identity import total_steps
from lmscale.config.run_file import load
from lmscale.config.schema import RunConfig
from lmscale_launcher.command_line import lmscale_command
from lmscale_launcher.planner.planned_resume import resume_point

if TYPE_CHECKING:  # it loads numpy
    from lmscale.corpus.staging import StagingResult

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class StagingTarget:
    """The node whose cache is filled."""

    node: int
    nodes: int
    ranks_per_node: int


def command(
    config: str | Path,
    *,
    node: int,
    nodes: int,
    ranks_per_node: int,
    overrides: Sequence[str] = (),
) -> list[str] | None:
    """The command that a supervisor runs before the ranks of this node; None where the run has no cache.

    `config` and `overrides` as for `lmscale train`. Raises ConfigError as they do.
    """
    if load(config, overrides).data.cache_dir is None:
        return None
    place = ["--node", node, "--nodes", nodes, "--ranks-per-node", ranks_per_node]
    return lmscale_command("stage", *map(str, [*place, "--", config, *overrides]))


def stage(cfg: RunConfig, place: StagingTarget, stop: threading.Event) -> ExitCode:
    """Fill data.cache_dir for one node. Raises ConfigError, DataError, RetryableError."""
    found = list(checks.world_problems(cfg, world_size=place.nodes * place.ranks_per_node))
    if found := [*found, *_misplaced(cfg)]:
        raise ConfigError(found)
    if cfg.data.cache_dir is None:
        return ExitCode.DONE
    try:
        _stage(cfg, place, Path(cfg.data.cache_dir), stop)
    except (
        OSError
    ) as error:  # of the cache: what goes wrong with the corpus has become an LmscaleError
        log.warning("stage: %s cannot be used (%s): the corpus is read instead", cfg.data.cache_dir,
                    error)  # fmt: skip
    if stop.is_set():
        log.info("stage: stopped on request")
        return ExitCode.SAVED
    return ExitCode.DONE


def _misplaced(cfg: RunConfig) -> Iterator[Problem]:
    if cfg.data.cache_dir is None:
        return
    cache = Path(cfg.data.cache_dir).resolve()
    for path in (*(corpus.path for corpus in cfg.data.corpora), *cfg.eval.corpora):
        if cache.is_relative_to(Path(path).resolve()):
            fact = f"{cfg.data.cache_dir} lies in the corpus {path}, of which every file is accounted for"
            yield Problem("data.cache_dir", fact, "name a folder outside of it")


def _stage(cfg: RunConfig, place: StagingTarget, cache_dir: Path, stop: threading.Event) -> None:
    from lmscale.corpus.manifest import load_part
    from lmscale.corpus.node_cache import cache_lock
    from lmscale.corpus.order import Order
    from lmscale.corpus.schedule import BatchSplit, chunks_ahead
    from lmscale.corpus.staging import Stager

    resume = resume_point(cfg)
    corpus, manifest = load_part(Path(cfg.data.corpora[0].path))
    samples = manifest.num_samples(cfg.train.seq_len)
    last = total_steps(cfg, lambda: samples, step=resume.step, position=resume.position)
    steps = min(last, cfg.train.stop_at or last) - resume.step
    if samples == 0 or steps <= 0:
        return  # the ranks report the error
    k = manifest.samples_per_chunk(cfg.train.seq_len)
    order = Order(
        samples,
        k,
        resume.streams,
        window_chunks=cfg.data.shuffle_window_chunks,
        seed=cfg.train.seed,
    )
    split = BatchSplit(
        cfg.train.global_batch_size, place.nodes, place.ranks_per_node, cfg.parallel.tp
    )
    blocks = chunks_ahead(order, split, node=place.node, position=resume.position, steps=steps)
    with cache_lock(cache_dir, stop, say=lambda text: log.info("stage: %s", text)) as mine:
        if not mine:
            return
        begun = time.monotonic()
        stager = Stager(corpus, manifest, cache_dir, cache_bytes=cfg.data.cache_bytes)
        with byte_progress("stage", sys.stderr, log=log.info) as show:
            done = stager.stage(blocks, max_chunks=-(-samples // k), stop=stop, progress=show)
    if not stop.is_set():
        log.info("stage: %s", _summary(done, cache_dir, time.monotonic() - begun))


def _summary(done: "StagingResult", cache_dir: Path, seconds: float) -> str:
    rate = f" ({show_bytes(done.copied_bytes / seconds)}/s)" if seconds > 0.1 else ""
    text = (
        f"{done.copied} chunks, {show_bytes(done.copied_bytes)}, copied to {cache_dir} in "
        f"{show_seconds(seconds)}{rate}; {done.present} were there already"
    )
    if done.evicted:
        text += f"; {done.evicted} that are not needed next were removed"
    if done.stopped_by:
        return f"{text}. No more: {done.stopped_by}; the rest is read from the corpus"
    if not done.all_fit:
        return f"{text}. The cache is full; the rest is read from the corpus"
    return f"{text}. This node needs no other chunk for the rest of this start"


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    stop = threading.Event()

    def end(*_: object) -> None:
        if not stop.is_set():
            stop.set()
            # No data is lost by exiting, and a read from a dead file system may never return.
            hard = threading.Timer(_PATIENCE_S, os._exit, (ExitCode.SAVED,))
            hard.daemon = True
            hard.start()

    before = [signal.signal(number, end) for number in _SIGNALS]
    try:
        yield stop
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def stage_verb(source: str, overrides: Sequence[str], target: StagingTarget) -> int:
    """Fill the cache of one node, unless a signal ends it earlier. Returns the exit code."""
    with _stop_on_signals() as stop:
        logs.configure(World())
        try:
            return stage(load(source, overrides), target, stop)
        except LmscaleError as error:
            log.error("error: %s", error)
            return error.exit_code
