"""Builds one rank's parts, floor by floor, and runs the loop to its end."""

import contextlib
import logging

import torch

from lmscale.config.length import total_steps
from lmscale.config.run import RunConfig
from lmscale.corpus.assign import wasted_frac
from lmscale.data.loader import Loader
from lmscale.dist.group import choose_device, distributed
from lmscale.dist.mesh import make_mesh
from lmscale.engine.build import build_engine
from lmscale.errors import ConfigError, ExitCode, Problem
from lmscale.model.flops import num_parameters
from lmscale.run.attempts import check_not_overtaken
from lmscale.run.events import EventLog
from lmscale.run.folder import RunFolder
from lmscale.run.pulse import Pulse
from lmscale.train.attempt import (
    Attempt,
    Source,
    check_identity,
    choose,
    note_changes,
    resumed_state,
)
from lmscale.train.body import checkpoint_body, placement_facts, run_identity
from lmscale.train.corpora import Corpora, open_corpora
from lmscale.train.finish import farewell, finish
from lmscale.train.layers import LayerStats
from lmscale.train.listen import open_listeners
from lmscale.train.loop import Loop
from lmscale.train.main import write_config
from lmscale.train.memory import explained, is_out_of_memory
from lmscale.train.parts import loader_of, model_of, recorder_of, trace_of, validation_of
from lmscale.train.profile import profile_of
from lmscale.train.rank import Rank
from lmscale.train.replicas import Replicas
from lmscale.train.save import Saver
from lmscale.train.scale import LossScale
from lmscale.train.signals import StopRequest
from lmscale.train.state import TrainState
from lmscale.world import World

log = logging.getLogger(__name__)


def train(
    cfg: RunConfig,
    world: World,
    stop: StopRequest,
    *,
    folder: RunFolder,
    events: EventLog | None,
    pulse: Pulse,
) -> ExitCode:
    """Open the corpora, meet the other ranks, train. Raises LmscaleError with what to do."""
    corpora = open_corpora(cfg, world_size=world.size)
    device = choose_device(world)
    # Refuses kernels whose sums depend on timing; the CPU kernels used here are deterministic anyway.
    torch.use_deterministic_algorithms(cfg.train.deterministic)
    with distributed(world, device=device):
        pulse.tick("load")
        mesh = make_mesh(cfg.parallel, world, device.type)
        rank = Rank(cfg, mesh, device, folder, events, pulse)
        try:
            return _train(rank, corpora, stop)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise explained(cfg, error) from error
            raise


def _train(rank: Rank, corpora: Corpora, stop: StopRequest) -> ExitCode:
    cfg = rank.cfg
    source = rank.on_root(lambda: choose(rank))
    state = resumed_state(source, cfg)
    same = run_identity(cfg, corpora, streams=state.streams)
    if source is not None:
        check_identity(cfg, source.body, same)
        if source.step >= (steps := _total_steps(cfg, corpora, state)):
            return _nothing_left(rank, source, steps)
    rank.on_root(lambda: write_config(rank.folder, cfg))
    _say_waste(rank)
    model = model_of(cfg, corpora.manifest.tokenizer.vocab_size)
    parameters = num_parameters(model).total
    engine = build_engine(cfg, model, rank.mesh, rank.device)
    attempt = Attempt(rank)
    source = attempt.begin(engine, source, placement=placement_facts(rank), same=same)
    state = resumed_state(source, cfg)
    note_changes(state, source, same)
    steps = _total_steps(cfg, corpora, state)
    _say_begin(rank, attempt, source, total_steps=steps)
    own_step = source.step if source is not None and not source.foreign else None
    saver = Saver(
        rank,
        engine,
        attempt=attempt.number,
        body=checkpoint_body(rank, same, state),
        newest_step=own_step,
    )
    with contextlib.ExitStack() as stack:
        # Lines are cut as close to this look as can be: a start that was asleep must not cut its heir's.
        rank.on_root(lambda: check_not_overtaken(rank.folder, attempt.number))
        ears = stack.enter_context(open_listeners(rank, total_steps=steps, from_step=state.step))
        loop = Loop(
            rank=rank,
            engine=engine,
            loader=loader_of(rank, corpora, state, mesh_share=True),
            state=state,
            total_steps=steps,
            recorder=recorder_of(rank, corpora, ears, parameters=parameters),
            layers=LayerStats(rank, engine, ears.layers),
            scale=LossScale(rank, engine),
            replicas=Replicas(rank, engine),
            validation=validation_of(rank, corpora),
            saver=saver,
            stop=stop,
            ears=ears,
            trace=trace_of(rank, corpora, state, attempt=attempt.number, ears=ears, stack=stack),
            profile=stack.enter_context(profile_of(rank)),
        )
        return _to_the_end(loop, corpora, counted=loader_of(rank, corpora, state, mesh_share=False))


def _to_the_end(loop: Loop, corpora: Corpora, *, counted: Loader) -> ExitCode:
    code = loop.fit()
    if loop.state.step >= loop.total_steps:
        code = finish(loop, corpora, counted=counted)
    farewell(loop, code)
    # Together: mpirun kills within 0.3 s whoever is left when one rank has ended with another code than 0.
    loop.rank.on_root(lambda: None)
    return code


def _total_steps(cfg: RunConfig, corpora: Corpora, state: TrainState) -> int:
    samples = corpora.train.num_samples
    return total_steps(cfg, lambda: samples, step=state.step, position=state.position)


def _nothing_left(rank: Rank, source: Source, steps: int) -> ExitCode:
    """A checkpoint of the last step: of this run, then it is finished; of another, then it is a mistake."""
    if source.foreign:
        fact = f"{source.path} stands at step {source.step}, the last of this run's {steps}"
        hint = "raise train.steps with train.allow_change='[train.steps]'"
        raise ConfigError([Problem("train.resume", fact, hint)])
    log.info(
        "finished: %s stands at step %d of %d. Its report: %s. To train on, raise train.steps with "
        "train.allow_change='[train.steps]'", rank.folder.path, source.step, steps, rank.folder.report,
    )  # fmt: skip
    return ExitCode.DONE


def _say_begin(rank: Rank, attempt: Attempt, source: Source | None, *, total_steps: int) -> None:
    step = source.step if source else 0
    if source:
        log.info("going on from step %d (%s) as attempt %d", step, source.path.name, attempt.number)
    rank.write_event("attempt", attempt=attempt.number, from_step=step, total_steps=total_steps)


def _say_waste(rank: Rank) -> None:
    train, mesh = rank.cfg.train, rank.mesh
    wasted = wasted_frac(train.global_batch, mesh.dp_size, train.micro_batch)
    if wasted:
        log.info(
            "%.1f %% of the rows computed are masked: train.global_batch=%d on %d ranks in micro-batches of %d",
            100 * wasted, train.global_batch, mesh.dp_size, train.micro_batch,
        )  # fmt: skip
