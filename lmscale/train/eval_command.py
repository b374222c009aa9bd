"""`lmscale eval RUN_OR_CHECKPOINT`: score a checkpoint, each held-out sample once, on any number of ranks."""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from lmscale import log as logs
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, ExitCode, Problem
from lmscale.train.restore import Trained, find_trained
from lmscale.world import World

log = logging.getLogger(__name__)


def main(argv: list[str]) -> ExitCode:
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


def _with_options(trained: Trained, args: argparse.Namespace, world: World) -> Trained:
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
    return Trained(trained.path, trained.step, cfg, trained.body)


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
    changed: dict[str, Any] = {"shard": "auto", "replicate": 1}
    tp = cfg.parallel.tp
    if ranks % tp:
        log.info("trained with parallel.tp=%d, scoring on %d rank(s) with tp=1", tp, ranks)
        changed |= {"tp": 1, "sequence_parallel": False}
    return changed


def _score(trained: Trained, world: World) -> list[dict[str, object]]:
    from lmscale.train.use import score

    return score(trained, world)


def _in_words(line: dict[str, object]) -> str:
    return f"step {line['step']}  {line['corpus']}  {line['metric']} {line['value']:.6f}  ({line['count']} targets)"
