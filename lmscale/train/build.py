"""From the run file to a trained model: builds the parts of one rank and runs the loop to its end.

Order: corpora, process group and mesh, model, engine, attempt (claim and load), callbacks, loop.
"""

import contextlib
import logging
from pathlib import Path

import torch

from lmscale.base.errors import ConfigError, ExitCode, Problem
from lmscale.base.fs import atomic_write, storage_errors
from lmscale.base.world import World
from lmscale.checks.resume_checks import check_identity
from lmscale.config.identity import total_steps
from lmscale.config.model_spec import decoder_spec
from lmscale.config.run_file import dump
from lmscale.config.schema import RunConfig
from lmscale.corpus.order import wasted_frac
from lmscale.data.loader import Loader, RankShare
from lmscale.distributed.mesh import make_mesh
from lmscale.distributed.process_group import choose_device, distributed
from lmscale.engine.build import build_engine
from lmscale.model.build import build_model, num_parameters
from lmscale.model.transformer import LanguageModel
from lmscale.modelspec.flops import flops_per_token
from lmscale.run_folder.attempts import check_not_overtaken
from lmscale.run_folder.events import EventLog
from lmscale.run_folder.paths import RunFolder
from lmscale.run_folder.rank_progress import RankProgress
from lmscale.train.callbacks import Callbacks, Recorder, cut_after, open_callbacks
from lmscale.train.checkpointing import CheckpointSaver
from lmscale.train.environment import environment, layout, peak_of
from lmscale.train.evaluation import Validation
from lmscale.train.finish import finish, summarize
from lmscale.train.layer_stats import LayerStats, LossScaleRecorder
from lmscale.train.loop import Trace, TrainLoop
from lmscale.train.out_of_memory import explained, is_out_of_memory
from lmscale.train.profile import profile_of
from lmscale.train.replicas import Replicas
from lmscale.train.restore import (
    AttemptClaim,
    ResumePoint,
    TrainState,
    checkpoint_body,
    choose,
    note_changes,
    placement_facts,
    resumed_state,
    run_identity,
)
from lmscale.train.run_context import RunContext
from lmscale.train.run_corpora import Corpora, build_order, open_corpora
from lmscale.train.stop_request import StopRequest

log = logging.getLogger(__name__)

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def train(
    cfg: RunConfig,
    world: World,
    stop: StopRequest,
    *,
    folder: RunFolder,
    events: EventLog | None,
    progress: RankProgress,
) -> ExitCode:
    """Open the corpora, join the process group, train. Raises LmscaleError with the next action."""
    corpora = open_corpora(cfg, world_size=world.size)
    device = choose_device(world)
    # Refuses kernels whose sums depend on timing; the CPU kernels in use are deterministic anyway.
    torch.use_deterministic_algorithms(cfg.train.deterministic)
    with distributed(world, device=device):
        progress.tick("load")
        mesh = make_mesh(cfg.parallel, world, device.type)
        rank = RunContext(cfg, mesh, device, folder, events, progress)
        try:
            return _train(rank, corpora, stop)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise explained(cfg, error) from error
            raise


def _train(rank: RunContext, corpora: Corpora, stop: StopRequest) -> ExitCode:
    cfg = rank.cfg
    resume_point = rank.on_root(lambda: choose(rank))
    state = resumed_state(resume_point, cfg)
    current_identity = run_identity(cfg, corpora, streams=state.streams)
    if resume_point is not None:
        check_identity(cfg, resume_point.body, current_identity)
        if resume_point.step >= (steps := _total_steps(cfg, corpora, state)):
            return _already_finished(rank, resume_point, steps)
    rank.on_root(lambda: write_config(rank.folder, cfg))
    _log_masked_rows(rank)
    model = model_of(cfg, corpora.manifest.tokenizer.vocab_size)
    parameters = num_parameters(model).total
    engine = build_engine(cfg, model, rank.mesh, rank.device)
    attempt = AttemptClaim(rank)
    resume_point = attempt.claim_and_load(
        engine, resume_point, placement=placement_facts(rank), current_identity=current_identity
    )
    state = resumed_state(resume_point, cfg)
    note_changes(state, resume_point, current_identity)
    steps = _total_steps(cfg, corpora, state)
    _report_start(rank, attempt, resume_point, total_steps=steps)
    resumed_step = (
        resume_point.step if resume_point is not None and not resume_point.foreign else None
    )
    saver = CheckpointSaver(
        rank,
        engine,
        attempt=attempt.number,
        body=checkpoint_body(rank, current_identity, state),
        newest_step=resumed_step,
    )
    with contextlib.ExitStack() as stack:
        # Truncate the line files right after this check, so that a suspended older attempt cannot
        # truncate those of a newer one.
        rank.on_root(lambda: check_not_overtaken(rank.folder, attempt.number))
        callbacks = stack.enter_context(
            open_callbacks(rank, total_steps=steps, from_step=state.step)
        )
        loop = TrainLoop(
            rank=rank,
            engine=engine,
            loader=loader_of(rank, corpora, state, mesh_share=True),
            state=state,
            total_steps=steps,
            recorder=recorder_of(rank, corpora, callbacks, parameters=parameters),
            layers=LayerStats(rank, engine, callbacks.layers),
            scale=LossScaleRecorder(rank, engine),
            replicas=Replicas(rank, engine),
            validation=validation_of(rank, corpora),
            saver=saver,
            stop=stop,
            callbacks=callbacks,
            trace=trace_of(
                rank, corpora, state, attempt=attempt.number, callbacks=callbacks, stack=stack
            ),
            profile=stack.enter_context(profile_of(rank)),
        )
        return _run_to_end(loop, corpora, counted=loader_of(rank, corpora, state, mesh_share=False))


def _run_to_end(loop: TrainLoop, corpora: Corpora, *, counted: Loader) -> ExitCode:
    code = loop.fit()
    if loop.state.step >= loop.total_steps:
        code = finish(loop, corpora, counted=counted)
    summarize(loop, code)
    # All ranks leave together: mpirun kills the others within 0.3 s of the first exit code other than 0.
    loop.rank.on_root(lambda: None)
    return code


def _total_steps(cfg: RunConfig, corpora: Corpora, state: TrainState) -> int:
    samples = corpora.train.num_samples
    return total_steps(cfg, lambda: samples, step=state.step, position=state.position)


def _already_finished(rank: RunContext, resume_point: ResumePoint, steps: int) -> ExitCode:
    """The checkpoint is of the last step: this run is finished; of another run it is an error."""
    if resume_point.foreign:
        fact = f"{resume_point.path} is of step {resume_point.step}, the last of this run's {steps}"
        hint = "raise train.steps with train.allow_change='[train.steps]'"
        raise ConfigError([Problem("train.resume", fact, hint)])
    log.info(
        "finished: %s has reached step %d of %d. Its report: %s. To train on, raise train.steps with "
        "train.allow_change='[train.steps]'", rank.folder.path, resume_point.step, steps, rank.folder.report,
    )  # fmt: skip
    return ExitCode.DONE


def _report_start(
    rank: RunContext, attempt: AttemptClaim, resume_point: ResumePoint | None, *, total_steps: int
) -> None:
    step = resume_point.step if resume_point else 0
    if resume_point:
        log.info(
            "resuming from step %d (%s) as attempt %d", step, resume_point.path.name, attempt.number
        )
    rank.write_event("attempt", attempt=attempt.number, from_step=step, total_steps=total_steps)


def _log_masked_rows(rank: RunContext) -> None:
    train, mesh = rank.cfg.train, rank.mesh
    wasted = wasted_frac(train.global_batch_size, mesh.dp_size, train.micro_batch_size)
    if wasted:
        log.info(
            "%.1f %% of the rows computed are masked: train.global_batch_size=%d on %d ranks in micro-batches of %d",
            100 * wasted, train.global_batch_size, mesh.dp_size, train.micro_batch_size,
        )  # fmt: skip


def write_config(folder: RunFolder, cfg: RunConfig) -> None:
    """Write the resolved run file atomically."""
    with storage_errors(f"writing {folder.config}"):
        folder.path.mkdir(parents=True, exist_ok=True)
        atomic_write(folder.config, dump(cfg).encode())


def model_of(cfg: RunConfig, vocab_size: int) -> LanguageModel:
    """The whole model with its initial weights, on the CPU; vocab_size: the tokenizer's."""
    return build_model(
        cfg.model,
        vocab_size=cfg.model.vocab_size or vocab_size,
        max_positions=cfg.model.max_positions or cfg.train.seq_len,
        seed=cfg.train.seed,
    )


def loader_of(rank: RunContext, corpora: Corpora, state: TrainState, *, mesh_share: bool) -> Loader:
    """This rank's part of each step; without mesh_share whole steps, to count the training samples."""
    cfg, mesh = rank.cfg, rank.mesh
    dp_rank, dp_size = (mesh.dp_rank, mesh.dp_size) if mesh_share else (0, 1)
    return Loader(
        corpora.train,
        build_order(cfg, corpora.train, streams=state.streams),
        RankShare(cfg.train.global_batch_size, cfg.train.micro_batch_size, dp_rank, dp_size),
        documents=cfg.data.documents,
        prefetch_steps=cfg.data.prefetch_steps,
    )


def validation_of(rank: RunContext, corpora: Corpora) -> Validation:
    """Scores the held-out corpora."""
    cfg = rank.cfg
    return Validation(
        corpora.held_out,
        token_bytes=corpora.tokenizer.token_bytes(),
        documents=cfg.data.documents,
        micro_batch=cfg.train.micro_batch_size,
        max_samples=cfg.eval.max_samples,
    )


def recorder_of(
    rank: RunContext, corpora: Corpora, callbacks: Callbacks, *, parameters: int
) -> Recorder:
    """Writer of metrics.jsonl; also writes the environment event. All ranks call it at the same time."""
    cfg, mesh = rank.cfg, rank.mesh
    peak = peak_of(rank.device, _DTYPES[cfg.engine.precision])
    spec = decoder_spec(
        cfg.model,
        vocab_size=cfg.model.vocab_size or corpora.manifest.tokenizer.vocab_size,
        max_positions=cfg.train.seq_len,
    )
    full, causal = (
        flops_per_token(spec, seq_len=cfg.train.seq_len, causal=causal) for causal in (False, True)
    )
    facts = environment(mesh.world, rank.device, engine=cfg.engine.kind, peak=peak)
    facts["parallel"] = layout(cfg, mesh)
    facts["FLOPs per token"] = f"{full:,.0f} (full, used for MFU); {causal:,.0f} (causal)"
    rank.write_event("environment", parameters=parameters, **facts)

    def mfu_at(tokens_per_s: float) -> float | None:
        if peak.flops_per_s is None:
            return None
        return tokens_per_s * full / (peak.flops_per_s * mesh.world.size)

    return Recorder(
        callbacks.recorded,
        seq_len=cfg.train.seq_len,
        max_nonfinite_steps=cfg.optim.max_nonfinite_steps,
        mfu_at=mfu_at,
    )


def trace_of(
    rank: RunContext,
    corpora: Corpora,
    state: TrainState,
    *,
    attempt: int,
    callbacks: Callbacks,
    stack: contextlib.ExitStack,
) -> Trace | None:
    """The trace file of this rank (data.trace); in a tp group only the first rank has one."""
    if not rank.cfg.data.trace or rank.mesh.tp_rank != 0:
        return None
    mine = rank.folder.trace(rank.mesh.world.rank)
    if rank.is_root:  # truncate also the files of ranks that wrote only in an earlier attempt
        writers = range(0, rank.mesh.world.size, rank.mesh.tp_size)
        for number in set(_ranks_traced(mine.parent)).difference(writers):
            cut_after(rank.folder.trace(number), state.step).close()
    file = stack.enter_context(cut_after(mine, state.step))
    callbacks.files.append(file)
    order = build_order(rank.cfg, corpora.train, streams=state.streams)
    return Trace(file, attempt, order, corpora.train.dtype)


def _ranks_traced(folder: Path) -> list[int]:
    names = (path.name for path in folder.glob("rank-*.jsonl"))
    return [int(name.removeprefix("rank-").removesuffix(".jsonl")) for name in names]
