"""A trained model at work: scored by any number of ranks, or loaded whole in this process.

`lmscale eval RUN_OR_CHECKPOINT`: score a checkpoint, each held-out sample once, on any number of ranks.

`lmscale generate CHECKPOINT --prompt TEXT`: continue a text with a trained model, in one process.
"""

import argparse
import json
import logging
import os
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


def eval_main(argv: list[str]) -> ExitCode:
    """One rank of `eval`; a world of one without RANK."""
    parser = argparse.ArgumentParser(prog="python -m lmscale eval")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--corpus", action="append", default=[])
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    world = World.from_env(os.environ)
    logs.configure(world)
    trained = _with_options(find_trained(args.checkpoint), args, world)
    lines = _score(trained, world)
    if world.is_root:
        show = json.dumps if args.json else _in_words
        for line in lines:
            print(show(line))
    return ExitCode.DONE


def _with_options(trained: TrainedModel, args: argparse.Namespace, world: World) -> TrainedModel:
    cfg = trained.cfg
    wanted = {"max_samples": args.max_samples} if args.max_samples is not None else {}
    if args.corpus:
        wanted["corpora"] = [str(Path(path).absolute()) for path in args.corpus]
    train = {"micro_batch": args.micro_batch} if args.micro_batch is not None else {}
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


def _score(trained: TrainedModel, world: World) -> list[dict[str, object]]:

    return score(trained, world)


def _in_words(line: dict[str, object]) -> str:
    return f"step {line['step']}  {line['corpus']}  {line['metric']} {line['value']:.6f}  ({line['count']} targets)"


def generate_main(argv: list[str]) -> ExitCode:
    """Print the continuation, or with --json {"tokens": [the new ones], "text": ...}."""
    parser = argparse.ArgumentParser(prog="python -m lmscale generate")
    parser.add_argument("checkpoint", type=Path)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt")
    given.add_argument("--tokens")
    parser.add_argument("--max-new", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    logs.configure(World())
    trained = find_trained(args.checkpoint)
    tokenizer = run_tokenizer(trained.cfg)
    check_tokenizer(trained, tokenizer.fingerprint)
    prompt = _prompt(args, tokenizer)

    model = load_model(trained.cfg, trained.path, vocab_size=tokenizer.vocab_size)
    from lmscale.model.generate import generate

    new = generate(
        model,
        prompt,
        max_new=args.max_new,
        temperature=args.temperature,
        eos=None if args.ignore_eos else tokenizer.special.eos,
        seed=args.seed,
    )
    text = tokenizer.decode(new)
    print(json.dumps({"tokens": new, "text": text}) if args.json else text)
    return ExitCode.DONE


def run_tokenizer(cfg: RunConfig) -> Tokenizer:
    """The tokenizer of a run: data.tokenizer, else the one beside its training corpus."""
    if cfg.data.tokenizer is not None:
        return Tokenizer.load(Path(cfg.data.tokenizer))
    corpus = corpus_folder(Path(cfg.data.corpora[0].path), "train")
    manifest = Manifest.load(corpus)
    special = SpecialTokens(**manifest.tokenizer.special)  # roles are not in tokenizer.json
    return Tokenizer.load(tokenizer_path(corpus, manifest), special)


def _prompt(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    if args.prompt is not None:
        bos = tokenizer.special.bos
        return ([] if bos is None else [bos]) + tokenizer.encode(args.prompt)
    try:
        tokens = [int(token) for token in args.tokens.split(",")]
    except ValueError:
        raise UsageError(f"--tokens {args.tokens!r}: write ids like 17,4,256") from None
    wrong = [token for token in tokens if not 0 <= token < tokenizer.vocab_size]
    if wrong:
        raise UsageError(
            f"--tokens: {wrong} are not ids of this vocabulary of {tokenizer.vocab_size}"
        )
    return tokens
