"""`lmscale plan RUN.yaml`: what a run will be, as far as it can be known without torch."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.train import world_of
from lmscale.config import checks
from lmscale.config.length import total_steps
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, DataError, Problem
from lmscale.run.checkpoints import newest_valid
from lmscale.run.folder import RunFolder
from lmscale.run.manifest import read_manifest
from lmscale.units import show_count


def facts(cfg: RunConfig, env: dict[str, str]) -> dict[str, Any]:
    """Steps, tokens, batches and the corpus in numbers. Raises ConfigError, DataError."""
    from lmscale.corpus.assign import micro_batches, wasted_frac
    from lmscale.corpus.manifest import Manifest, resolve

    dp_size, num_ranks = _dp_size(cfg, env)
    manifest = Manifest.load(resolve(Path(cfg.data.corpora[0].path)))
    samples = manifest.num_samples(cfg.train.seq_len)
    steps, batch = total_steps(cfg, lambda: samples), cfg.train.global_batch
    if samples < batch:
        fact = f"{batch} samples a step, but the corpus has {samples} of {cfg.train.seq_len} tokens"
        raise ConfigError([Problem("train.global_batch", fact, "use fewer, or a larger corpus")])
    return {
        "run_dir": str(cfg.train.run_dir),
        "steps": steps,
        "tokens": steps * batch * cfg.train.seq_len,
        "global_batch_samples": batch,
        "global_batch_tokens": batch * cfg.train.seq_len,
        "ranks": num_ranks,
        "dp_size": dp_size,
        "micro_batches": micro_batches(batch, dp_size, cfg.train.micro_batch),
        "wasted_frac": wasted_frac(batch, dp_size, cfg.train.micro_batch),
        "corpus": cfg.data.corpora[0].path,
        "corpus_samples": samples,
        "corpus_tokens": manifest.tokens,
        "vocab_size": manifest.tokenizer.vocab_size,
        "epochs": steps * batch / samples,
    }


def in_words(plan: dict[str, Any]) -> Iterator[str]:
    """The facts for people, a line each."""
    samples, tokens = plan["global_batch_samples"], plan["global_batch_tokens"]
    yield f"steps          {plan['steps']:,}, {show_count(plan['tokens'])} tokens"
    yield f"global batch   {samples:,} samples, {tokens:,} tokens"
    yield (
        f"ranks          {plan['ranks']}, data-parallel {plan['dp_size']}; "
        f"{plan['micro_batches']} micro-batches a step on each, "
        f"{100 * plan['wasted_frac']:.1f} % of the rows are fillers"
    )
    yield (
        f"corpus         {plan['corpus']}: {plan['corpus_samples']:,} samples, "
        f"{show_count(plan['corpus_tokens'])} tokens, vocabulary of {plan['vocab_size']}"
    )
    yield f"epochs         {plan['epochs']:.2f}"
    yield f"run folder     {plan['run_dir']}"


def data_rows(cfg: RunConfig, steps: str | None, env: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One row a sample of the steps A:B (both included, from 1; all steps without)."""
    from lmscale.corpus.manifest import resolve
    from lmscale.corpus.order import Order
    from lmscale.corpus.plan import rows
    from lmscale.corpus.reader import Reader

    dp_size, _ = _dp_size(cfg, env)
    _refuse_changed_batch(cfg)
    reader = Reader(
        resolve(Path(cfg.data.corpora[0].path)), seq_len=cfg.train.seq_len, memory_bytes=0
    )
    if reader.num_samples == 0:
        raise DataError(f"{reader.path} holds no sample of {cfg.train.seq_len} tokens")
    order = Order(
        reader.num_samples,
        reader.samples_per_chunk,
        _streams(cfg),
        window=cfg.data.shuffle_window,
        seed=cfg.train.seed,
    )
    wanted = _steps(steps, total_steps(cfg, lambda: reader.num_samples))
    found = rows(
        reader,
        order,
        steps=wanted,
        global_batch=cfg.train.global_batch,
        dp_size=dp_size,
        tp_size=cfg.parallel.tp,
    )
    return (dict(row) for row in found)


def row_in_words(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['position']:>10}  epoch {row['epoch']}  sample {row['sample']:>8}  "
        f"rank {row['rank']:>4}  {row['shard']} at {row['offset']}, {row['bytes']} bytes"
    )


def as_json(value: dict[str, Any]) -> str:
    """One line for programs."""
    return json.dumps(value)


def _dp_size(cfg: RunConfig, env: dict[str, str]) -> tuple[int, int]:
    nodes = cfg.cluster.nodes
    # A plan is made on any machine: the number of hosts is the run file's, not this start's.
    on_each, *_ = world_of(cfg.model_copy(update={"cluster": _one_node(cfg)}), env)
    world_size = on_each * nodes
    if found := list(checks.world_problems(cfg, world_size=world_size)):
        raise ConfigError(found)
    return world_size // cfg.parallel.tp, world_size


def _one_node(cfg: RunConfig) -> Any:
    return cfg.cluster.model_copy(update={"nodes": 1})


def _streams(cfg: RunConfig) -> int:
    """The order's streams: a run keeps those of its first start."""
    found = newest_valid(RunFolder(Path(cfg.train.run_dir)))
    if found is not None:
        kept = read_manifest(found.path).get("identity", {}).get("data.streams")
        if isinstance(kept, int):
            return kept
    return cfg.data.streams or cfg.train.global_batch


def _refuse_changed_batch(cfg: RunConfig) -> None:
    """Which sample a step has follows from its position, step x batch: not so where the batch changed."""
    found = newest_valid(RunFolder(Path(cfg.train.run_dir)))
    if found is None:
        return
    journal = read_manifest(found.path).get("state", {}).get("train", {}).get("journal", [])
    for entry in journal:
        if entry["key"] == "train.global_batch":
            fact = (
                f"{entry['before']} until step {entry['step']} of {found.path}, then {entry['now']}"
            )
            hint = "plan --data cannot list such a run yet; data.trace records what is trained on"
            raise ConfigError([Problem("train.global_batch", fact, hint)])


def _steps(text: str | None, last: int) -> range:
    match = re.fullmatch(r"(\d+):(\d+)", text or f"1:{last}")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        hint = "write first:last, both included, from 1, e.g. 1:10"
        raise ConfigError([Problem("--steps", f"cannot read {text!r}", hint)])
    return range(int(match[1]), int(match[2]) + 1)
