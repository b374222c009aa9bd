"""A trained model at work: scored by any number of ranks, or loaded whole in this process.

`lmscale eval RUN_OR_CHECKPOINT`: score a checkpoint, each held-out sample once, on any number of ranks.

`lmscale generate CHECKPOINT --prompt TEXT`: continue a text with a trained model, in one process.
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
from lmscale.checkpoint.load import load
from lmscale.config.schema import RunConfig
from lmscale.corpus.manifest import Manifest, corpus_folder, tokenizer_path
from lmscale.distributed.mesh import make_mesh
from lmscale.distributed.process_group import choose_device, distributed
from lmscale.engine.build import build_engine
from lmscale.model.transformer import LanguageModel
from lmscale.run_folder.paths import RunFolder
from lmscale.tokenizer.tokenizer import SpecialTokens, Tokenizer
from lmscale.train.build import model_of, validation_of
from lmscale.train.callbacks import Line
from lmscale.train.context import RunContext
from lmscale.train.corpora import open_corpora
from lmscale.train.restore import TrainedModel, check_tokenizer, find_trained

log = logging.getLogger(__name__)


def score(trained: TrainedModel, world: World) -> list[Line]:
    """Validation of a checkpoint's weights by any number of ranks, the lines of eval.jsonl."""
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
        load(trained.path, tensors)
        return validation_of(rank, corpora).score(engine, rank, step=trained.step)


def load_model(cfg: RunConfig, checkpoint: Path, *, vocab_size: int) -> LanguageModel:
    """A model with a checkpoint's weights, in this process."""
    model = model_of(cfg, vocab_size)
    load(checkpoint, {f"model.{name}": p.data for name, p in model.named_parameters()})
    model.eval()
    return model


log = logging.getLogger(__name__)


def eval_verb(
    checkpoint: Path,
    *,
    corpora: Sequence[Path],
    max_samples: int | None,
    micro_batch_size: int | None,
    as_json: bool,
) -> ExitCode:
    """Score a checkpoint as one rank, a world of one without RANK; rank 0 prints the lines."""
    world = World.from_env(os.environ)
    logs.configure(world)
    wanted: dict[str, Any] = {}
    if max_samples is not None:
        wanted["max_samples"] = max_samples
    if corpora:
        wanted["corpora"] = [str(path.absolute()) for path in corpora]
    trained = _with_options(find_trained(checkpoint), wanted, micro_batch_size, world)
    lines = score(trained, world)
    if world.is_root:
        show = json.dumps if as_json else _in_words
        for line in lines:
            print(show(line))
    return ExitCode.DONE


def _with_options(
    trained: TrainedModel, wanted: dict[str, Any], micro_batch_size: int | None, world: World
) -> TrainedModel:
    """The model with other keys of eval.* and the engine and mesh that score it on this world."""
    cfg = trained.cfg
    train = {"micro_batch_size": micro_batch_size} if micro_batch_size is not None else {}
    cfg = cfg.model_copy(
        update={
            "eval": cfg.eval.model_copy(update=wanted),
            "train": cfg.train.model_copy(update=train),
            "engine": cfg.engine.model_copy(update=_engine(cfg)),
            "parallel": cfg.parallel.model_copy(update=_parallel(cfg, world.size)),
        }
    )
    if not cfg.eval.corpora:
        raise ConfigError(
            [
                Problem(
                    "eval.corpora",
                    "the run names none",
                    "name one: lmscale eval CHECKPOINT --corpus PATH",
                )
            ]
        )
    return TrainedModel(trained.path, trained.step, cfg, trained.body)


def _engine(cfg: RunConfig) -> dict[str, Any]:
    """Scoring needs no optimizer and no replica: the sharded engine holds the least and runs on any world."""
    changed = {
        "kind": "fsdp",
        "compile": False,
        "activation_checkpointing": "none",
        "offload": "none",
        "reshard_after_forward": True,
    }
    if cfg.engine.precision == "fp16":  # deepspeed's alone; the masters are fp32 anyway
        log.info("engine.precision is fp16, which only deepspeed trains in: scoring in fp32")
        changed["precision"] = "fp32"
    return changed


def _parallel(cfg: RunConfig, ranks: int) -> dict[str, Any]:
    """The run's tensor parallelism where the ranks make up whole groups of it, else none."""
    changed: dict[str, Any] = {"dp_shard": "auto", "dp_replicate": 1}
    tp = cfg.parallel.tp
    if ranks % tp:
        log.info("trained with parallel.tp=%d, scoring on %d rank(s) with tp=1", tp, ranks)
        changed |= {"tp": 1, "sequence_parallel": False}
    return changed


def _in_words(line: dict[str, object]) -> str:
    return f"step {line['step']}  {line['corpus']}  {line['metric']} {line['value']:.6f}  ({line['count']} targets)"


def generate_verb(  # noqa: PLR0913 one parameter per option
    checkpoint: Path,
    *,
    prompt: str | None,
    tokens: str | None,
    max_new: int,
    temperature: float,
    seed: int,
    ignore_eos: bool,
    as_json: bool,
) -> ExitCode:
    """Print the continuation of a text or of ids; as JSON {"tokens": [the new ones], "text": ...}."""
    logs.configure(World())
    trained = find_trained(checkpoint)
    tokenizer = run_tokenizer(trained.cfg)
    check_tokenizer(trained, tokenizer.fingerprint)
    context = _context(prompt, tokens, tokenizer)

    model = load_model(trained.cfg, trained.path, vocab_size=tokenizer.vocab_size)
    from lmscale.model.generate import generate

    new = generate(
        model,
        context,
        max_new=max_new,
        temperature=temperature,
        eos=None if ignore_eos else tokenizer.special.eos,
        seed=seed,
    )
    text = tokenizer.decode(new)
    print(json.dumps({"tokens": new, "text": text}) if as_json else text)
    return ExitCode.DONE


def run_tokenizer(cfg: RunConfig) -> Tokenizer:
    """The tokenizer of a run: data.tokenizer, else the one beside its training corpus."""
    if cfg.data.tokenizer is not None:
        return Tokenizer.load(Path(cfg.data.tokenizer))
    corpus = corpus_folder(Path(cfg.data.corpora[0].path), "train")
    manifest = Manifest.load(corpus)
    special = SpecialTokens(**manifest.tokenizer.special)  # roles are not in tokenizer.json
    return Tokenizer.load(tokenizer_path(corpus, manifest), special)


def _context(prompt: str | None, tokens: str | None, tokenizer: Tokenizer) -> list[int]:
    """The ids to continue, from a text or from a list of ids. Raises UsageError."""
    if prompt is not None:
        bos = tokenizer.special.bos
        return ([] if bos is None else [bos]) + tokenizer.encode(prompt)
    try:
        ids = [int(token) for token in (tokens or "").split(",")]
    except ValueError:
        raise UsageError(f"--tokens {tokens!r}: write ids like 17,4,256") from None
    wrong = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
    if wrong:
        raise UsageError(
            f"--tokens: {wrong} are not ids of this vocabulary of {tokenizer.vocab_size}"
        )
    return ids
