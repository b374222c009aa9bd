"""Builds one rank's parts, floor by floor, and runs the loop to its end."""

import contextlib
import logging
from pathlib import Path

import torch

from lmscale.checkpoint.load import load
from lmscale.config.length import total_steps
from lmscale.config.run import RunConfig
from lmscale.corpus.assign import wasted_frac
from lmscale.data.loader import Loader, Share
from lmscale.dist.group import choose_device, distributed
from lmscale.dist.mesh import make_mesh
from lmscale.engine.build import build_engine
from lmscale.errors import ConfigError, ExitCode, Problem
from lmscale.model.build import build_model
from lmscale.model.flops import flops_per_token, num_parameters
from lmscale.model.language import LanguageModel
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
from lmscale.train.corpora import Corpora, build_order, open_corpora
from lmscale.train.environment import environment, peak_of
from lmscale.train.evaluate import Validation
from lmscale.train.finish import farewell, finish
from lmscale.train.listen import Listeners, cut_after, open_listeners
from lmscale.train.loop import Loop, Trace
from lmscale.train.main import write_config
from lmscale.train.memory import explained, is_out_of_memory
from lmscale.train.profile import profile_of
from lmscale.train.rank import Rank
from lmscale.train.record import Line, Recorder
from lmscale.train.restore import Trained, check_tokenizer
from lmscale.train.save import Saver
from lmscale.train.signals import StopRequest
from lmscale.train.state import TrainState
from lmscale.world import World

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


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
    model = _build_model(cfg, corpora.manifest.tokenizer.vocab_size)
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
            loader=_loader(rank, corpora, state, mesh_share=True),
            state=state,
            total_steps=steps,
            recorder=_recorder(rank, corpora, ears, parameters=parameters),
            validation=_validation(rank, corpora),
            saver=saver,
            stop=stop,
            ears=ears,
            trace=_trace(rank, corpora, state, attempt=attempt.number, ears=ears, stack=stack),
            profile=stack.enter_context(profile_of(rank)),
        )
        return _to_the_end(loop, corpora, counted=_loader(rank, corpora, state, mesh_share=False))


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


def _build_model(cfg: RunConfig, vocab_size: int) -> LanguageModel:
    return build_model(
        cfg.model,
        vocab_size=cfg.model.vocab_size or vocab_size,
        max_positions=cfg.model.max_positions or cfg.train.seq_len,
        seed=cfg.train.seed,
    )


def _loader(rank: Rank, corpora: Corpora, state: TrainState, *, mesh_share: bool) -> Loader:
    """This rank's share of each step; without mesh_share whole steps, to count what the run was trained on."""
    cfg, mesh = rank.cfg, rank.mesh
    dp_rank, dp_size = (mesh.dp_rank, mesh.dp_size) if mesh_share else (0, 1)
    return Loader(
        corpora.train,
        build_order(cfg, corpora.train, streams=state.streams),
        Share(cfg.train.global_batch, cfg.train.micro_batch, dp_rank, dp_size),
        documents=cfg.data.documents,
        prefetch=cfg.data.prefetch,
    )


def _validation(rank: Rank, corpora: Corpora) -> Validation:
    cfg = rank.cfg
    return Validation(
        corpora.held_out,
        token_bytes=corpora.tokenizer.token_bytes(),
        documents=cfg.data.documents,
        micro_batch=cfg.train.micro_batch,
        max_samples=cfg.eval.max_samples,
    )


def _recorder(rank: Rank, corpora: Corpora, ears: Listeners, *, parameters: int) -> Recorder:
    cfg, mesh = rank.cfg, rank.mesh
    peak = peak_of(rank.device, _DTYPES[cfg.engine.precision])
    full, causal = (
        flops_per_token(
            cfg.model,
            seq_len=cfg.train.seq_len,
            vocab_size=cfg.model.vocab_size or corpora.manifest.tokenizer.vocab_size,
            causal=causal,
        )
        for causal in (False, True)
    )
    facts = environment(mesh.world, rank.device, engine=cfg.engine.kind, peak=peak)
    facts["FLOPs per token"] = f"{full:,.0f} (full, used for MFU); {causal:,.0f} (causal)"
    rank.write_event("environment", parameters=parameters, **facts)

    def mfu_at(tokens_per_s: float) -> float | None:
        if peak.flops_per_s is None:
            return None
        return tokens_per_s * full / (peak.flops_per_s * mesh.world.size)

    return Recorder(
        ears.recorded, seq_len=cfg.train.seq_len, max_skips=cfg.optim.max_skips, mfu_at=mfu_at
    )


def _trace(
    rank: Rank,
    corpora: Corpora,
    state: TrainState,
    *,
    attempt: int,
    ears: Listeners,
    stack: contextlib.ExitStack,
) -> Trace | None:
    if not rank.cfg.data.trace or rank.mesh.tp_rank != 0:
        return None
    mine = rank.folder.trace(rank.mesh.world.rank)
    if rank.is_root:  # files of ranks that an earlier attempt had and this one has not
        for number in _ranks_traced(mine.parent):
            if number >= rank.mesh.world.size:
                cut_after(rank.folder.trace(number), state.step).close()
    file = stack.enter_context(cut_after(mine, state.step))
    ears.files.append(file)
    order = build_order(rank.cfg, corpora.train, streams=state.streams)
    return Trace(file, attempt, order, corpora.train.dtype)


def _ranks_traced(folder: Path) -> list[int]:
    names = (path.name for path in folder.glob("rank-*.jsonl"))
    return [int(name.removeprefix("rank-").removesuffix(".jsonl")) for name in names]


def score(trained: Trained, world: World) -> list[Line]:
    """Validation of a checkpoint's weights by any number of ranks, the lines of eval.jsonl."""
    cfg = trained.cfg
    corpora = open_corpora(cfg, world_size=world.size)
    check_tokenizer(trained, corpora.manifest.tokenizer.fingerprint)
    device = choose_device(world)
    with distributed(world, device=device):
        mesh = make_mesh(cfg.parallel, world, device.type)
        rank = Rank(cfg, mesh, device, RunFolder(trained.run_dir), None)
        model = _build_model(cfg, corpora.manifest.tokenizer.vocab_size)
        engine = build_engine(cfg, model, mesh, device)
        tensors = {name: t for name, t in engine.state().items() if name.startswith("model.")}
        load(trained.path, tensors)
        return _validation(rank, corpora).score(engine, rank, step=trained.step)


def load_model(cfg: RunConfig, checkpoint: Path, *, vocab_size: int) -> LanguageModel:
    """A model with a checkpoint's weights, in this process."""
    model = _build_model(cfg, vocab_size)
    load(checkpoint, {f"model.{name}": p.data for name, p in model.named_parameters()})
    model.eval()
    return model
