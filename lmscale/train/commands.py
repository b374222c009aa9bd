"""The verbs that use a trained model and do not train.

`lmscale eval` scores a checkpoint on any number of ranks, each held-out sample once; `lmscale
generate` continues a text in one process.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmscale.base import log as logs
from lmscale.base.errors import ConfigError, ExitCode, Problem, UsageError
from lmscale.base.world import World
from lmscale.checkpoint.load import load_checkpoint
from lmscale.config.schema import RunConfig
from lmscale.corpus.manifest import Manifest, corpus_folder, tokenizer_path
from lmscale.distributed.mesh import make_mesh
from lmscale.distributed.process_group import choose_device, distributed
from lmscale.engine.build import build_engine
from lmscale.model.generate import generate
from lmscale.model.transformer import LanguageModel
from lmscale.run_folder.paths import RunFolder
from lmscale.tokenizer.tokenizer import SpecialTokens, Tokenizer
from lmscale.train.build import model_of, validation_of
from lmscale.train.callbacks import Line
from lmscale.train.restore import TrainedModel, check_tokenizer, find_trained
from lmscale.train.run_context import RunContext
from lmscale.train.run_corpora import open_corpora

log = logging.getLogger(__name__)


def eval_verb(
    checkpoint: Path,
    *,
    corpora: Sequence[Path] = (),
    max_samples: int | None = None,
    micro_batch_size: int | None = None,
    as_json: bool = False,
) -> ExitCode:
    """One rank of `lmscale eval`; rank 0 prints the scores, one line per corpus and metric.

    checkpoint: its folder, or a run folder (its newest valid checkpoint). corpora: scored instead of
    eval.corpora. Raises UsageError, ConfigError, CheckpointError. Collective.
    """
    world = World.from_env(os.environ)
    logs.configure(world)
    trained = find_trained(checkpoint)
    evaluation: dict[str, Any] = {} if max_samples is None else {"max_samples": max_samples}
    if corpora:
        evaluation["corpora"] = [str(path.absolute()) for path in corpora]
    train = {} if micro_batch_size is None else {"micro_batch_size": micro_batch_size}
    cfg = _scoring_config(trained.cfg, evaluation=evaluation, train=train, ranks=world.size)
    lines = score(TrainedModel(trained.path, trained.step, cfg, trained.body), world)
    if world.is_root:
        for line in lines:
            print(json.dumps(line) if as_json else _as_text(line))
    return ExitCode.DONE


def generate_verb(  # noqa: PLR0913 one keyword per option
    checkpoint: Path,
    *,
    max_new: int,
    prompt: str | None = None,
    tokens: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    ignore_eos: bool = False,
    as_json: bool = False,
) -> ExitCode:
    """Print the continuation of a prompt, or as JSON {"tokens": [the new ones], "text": ...}.

    Give prompt (a text) or tokens (ids separated by commas), not both. max_new: most new tokens.
    temperature 0 takes the most probable token each time. Raises UsageError, CheckpointError.
    """
    if (prompt is None) == (tokens is None):
        raise UsageError("give either --prompt TEXT or --tokens IDS")
    logs.configure(World())
    trained = find_trained(checkpoint)
    tokenizer = run_tokenizer(trained.cfg)
    check_tokenizer(trained, tokenizer.fingerprint)
    ids = _encoded(prompt, tokenizer) if prompt is not None else _token_ids(tokens or "", tokenizer)
    model = load_model(trained.cfg, trained.path, vocab_size=tokenizer.vocab_size)
    new = generate(
        model,
        ids,
        max_new=max_new,
        temperature=temperature,
        eos=None if ignore_eos else tokenizer.special.eos,
        seed=seed,
    )
    text = tokenizer.decode(new)
    print(json.dumps({"tokens": new, "text": text}) if as_json else text)
    return ExitCode.DONE


def score(trained: TrainedModel, world: World) -> list[Line]:
    """Validation of a checkpoint's weights: the lines of eval.jsonl. Collective, any number of ranks."""
    cfg = trained.cfg
    corpora = open_corpora(cfg, world_size=world.size)
    check_tokenizer(trained, corpora.manifest.tokenizer.fingerprint)
    device = choose_device(world)
    with distributed(world, device=device):
        mesh = make_mesh(cfg.parallel, world, device.type)
        rank = RunContext(cfg, mesh, device, RunFolder(trained.run_dir), None)
        model = model_of(cfg, corpora.manifest.tokenizer.vocab_size)
        engine = build_engine(cfg, model, mesh, device)
        tensors = {name: t for name, t in engine.state().items() if name.startswith("model.")}
        load_checkpoint(trained.path, tensors)
        return validation_of(rank, corpora).score(engine, rank, step=trained.step)


def load_model(cfg: RunConfig, checkpoint: Path, *, vocab_size: int) -> LanguageModel:
    """A model with a checkpoint's weights, in this process."""
    model = model_of(cfg, vocab_size)
    load_checkpoint(checkpoint, {f"model.{name}": p.data for name, p in model.named_parameters()})
    model.eval()
    return model


def run_tokenizer(cfg: RunConfig) -> Tokenizer:
    """The tokenizer of a run: data.tokenizer, else the one beside its training corpus."""
    if cfg.data.tokenizer is not None:
        return Tokenizer.load(Path(cfg.data.tokenizer))
    corpus = corpus_folder(Path(cfg.data.corpora[0].path), "train")
    manifest = Manifest.load(corpus)
    special = SpecialTokens(**manifest.tokenizer.special)  # roles are not in tokenizer.json
    return Tokenizer.load(tokenizer_path(corpus, manifest), special)


def _scoring_config(
    cfg: RunConfig, *, evaluation: dict[str, Any], train: dict[str, Any], ranks: int
) -> RunConfig:
    """The run file with the options of `eval`, and with an engine and a mesh fit for scoring."""
    cfg = cfg.model_copy(
        update={
            "eval": cfg.eval.model_copy(update=evaluation),
            "train": cfg.train.model_copy(update=train),
            "engine": cfg.engine.model_copy(update=_engine_changes(cfg)),
            "parallel": cfg.parallel.model_copy(update=_parallel_changes(cfg, ranks)),
        }
    )
    if not cfg.eval.corpora:
        fact, hint = "the run names none", "name one: lmscale eval CHECKPOINT --corpus PATH"
        raise ConfigError([Problem("eval.corpora", fact, hint)])
    return cfg


def _engine_changes(cfg: RunConfig) -> dict[str, Any]:
    """Scoring needs no optimizer and no replica: fsdp needs the least memory and runs on any world."""
    changed = {
        "kind": "fsdp",
        "compile": False,
        "activation_checkpointing": "none",
        "offload": "none",
        "reshard_after_forward": True,
    }
    if cfg.engine.precision == "fp16":  # supported by deepspeed only; the master weights are fp32
        log.info("engine.precision is fp16, which only deepspeed trains in: scoring in fp32")
        changed["precision"] = "fp32"
    return changed


def _parallel_changes(cfg: RunConfig, ranks: int) -> dict[str, Any]:
    """The run's tensor parallelism where the number of ranks is a multiple of it, else none."""
    changed: dict[str, Any] = {"dp_shard": "auto", "dp_replicate": 1}
    tp = cfg.parallel.tp
    if ranks % tp:
        log.info("trained with parallel.tp=%d, scoring on %d rank(s) with tp=1", tp, ranks)
        changed |= {"tp": 1, "sequence_parallel": False}
    return changed


def _as_text(line: Line) -> str:
    score_text = f"{line['metric']} {line['value']:.6f}"
    return f"step {line['step']}  {line['corpus']}  {score_text}  ({line['count']} targets)"


def _encoded(prompt: str, tokenizer: Tokenizer) -> list[int]:
    bos = tokenizer.special.bos
    return ([] if bos is None else [bos]) + tokenizer.encode(prompt)


def _token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        tokens = [int(token) for token in text.split(",")]
    except ValueError:
        raise UsageError(f"--tokens {text!r}: write ids like 17,4,256") from None
    wrong = [token for token in tokens if not 0 <= token < tokenizer.vocab_size]
    if wrong:
        raise UsageError(
            f"--tokens: {wrong} are not ids of this vocabulary of {tokenizer.vocab_size}"
        )
    return tokens
