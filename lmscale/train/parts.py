"""The parts of one rank that follow from the run file: model, data, validation, books, trace."""

import contextlib
from pathlib import Path

import torch

from lmscale.config.run import RunConfig
from lmscale.data.loader import Loader, Share
from lmscale.model.build import build_model
from lmscale.model.flops import flops_per_token
from lmscale.model.language import LanguageModel
from lmscale.train.corpora import Corpora, build_order
from lmscale.train.environment import environment, layout, peak_of
from lmscale.train.evaluate import Validation
from lmscale.train.listen import Listeners, cut_after
from lmscale.train.loop import Trace
from lmscale.train.rank import Rank
from lmscale.train.record import Recorder
from lmscale.train.state import TrainState

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def model_of(cfg: RunConfig, vocab_size: int) -> LanguageModel:
    """The whole model with its initial weights, on the CPU; vocab_size: the tokenizer's."""
    return build_model(
        cfg.model,
        vocab_size=cfg.model.vocab_size or vocab_size,
        max_positions=cfg.model.max_positions or cfg.train.seq_len,
        seed=cfg.train.seed,
    )


def loader_of(rank: Rank, corpora: Corpora, state: TrainState, *, mesh_share: bool) -> Loader:
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


def validation_of(rank: Rank, corpora: Corpora) -> Validation:
    """What scores the held-out corpora."""
    cfg = rank.cfg
    return Validation(
        corpora.held_out,
        token_bytes=corpora.tokenizer.token_bytes(),
        documents=cfg.data.documents,
        micro_batch=cfg.train.micro_batch,
        max_samples=cfg.eval.max_samples,
    )


def recorder_of(rank: Rank, corpora: Corpora, ears: Listeners, *, parameters: int) -> Recorder:
    """The books of metrics.jsonl; what the run runs on goes to the events, too. All ranks at the same time."""
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
    facts["parallel"] = layout(cfg, mesh)
    facts["FLOPs per token"] = f"{full:,.0f} (full, used for MFU); {causal:,.0f} (causal)"
    rank.write_event("environment", parameters=parameters, **facts)

    def mfu_at(tokens_per_s: float) -> float | None:
        if peak.flops_per_s is None:
            return None
        return tokens_per_s * full / (peak.flops_per_s * mesh.world.size)

    return Recorder(
        ears.recorded, seq_len=cfg.train.seq_len, max_skips=cfg.optim.max_skips, mfu_at=mfu_at
    )


def trace_of(
    rank: Rank,
    corpora: Corpora,
    state: TrainState,
    *,
    attempt: int,
    ears: Listeners,
    stack: contextlib.ExitStack,
) -> Trace | None:
    """Where this rank writes its samples, with data.trace; of a tp group only the first rank has one."""
    if not rank.cfg.data.trace or rank.mesh.tp_rank != 0:
        return None
    mine = rank.folder.trace(rank.mesh.world.rank)
    if rank.is_root:  # files of ranks that wrote in an earlier attempt and do not in this one
        writers = range(0, rank.mesh.world.size, rank.mesh.tp_size)
        for number in set(_ranks_traced(mine.parent)).difference(writers):
            cut_after(rank.folder.trace(number), state.step).close()
    file = stack.enter_context(cut_after(mine, state.step))
    ears.files.append(file)
    order = build_order(rank.cfg, corpora.train, streams=state.streams)
    return Trace(file, attempt, order, corpora.train.dtype)


def _ranks_traced(folder: Path) -> list[int]:
    names = (path.name for path in folder.glob("rank-*.jsonl"))
    return [int(name.removeprefix("rank-").removesuffix(".jsonl")) for name in names]
