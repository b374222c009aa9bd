"""The training corpus of a plan, what each node reads of it, and the rows of `lmscale plan --data`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmscale.base.errors import ConfigError, DataError, Problem
from lmscale.config.identity import total_steps
from lmscale.config.schema import RunConfig
from lmscale_launcher.planner.planned_resume import PlannedResume, resume_point
from lmscale_launcher.planner.topology import PlannedTopology, planned_topology

if TYPE_CHECKING:  # it loads numpy
    from lmscale.corpus.manifest import Manifest

ASSUMED_VOCAB = (
    32_000  # that of Llama; the size of a model can be planned before a corpus is prepared
)


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """Sizes of the training corpus; None where it does not exist."""

    path: str
    samples: int | None
    tokens: int | None
    vocab_size: int  # with which the model is built
    vocab_from: Literal["corpus", "model.vocab_size", "data.tokenizer", "assumed"]
    manifest: "Manifest | None" = None  # read only once: that of a million shards takes seconds


def corpus_facts(cfg: RunConfig) -> CorpusFacts:
    """Sizes from the manifest. Raises ConfigError where the corpus cannot fill a step, DataError for damage."""
    path = cfg.data.corpora[0].path
    if not Path(path).exists():
        return CorpusFacts(path, None, None, *_vocabulary(cfg))
    from lmscale.checks.corpus_checks import too_few_samples
    from lmscale.corpus.manifest import load_part

    _, manifest = load_part(Path(path))
    if problems := list(too_few_samples(cfg, manifest)):
        raise ConfigError(problems)
    samples = manifest.num_samples(cfg.train.seq_len)
    given, size = cfg.model.vocab_size, manifest.tokenizer.vocab_size
    if given is not None:
        return CorpusFacts(path, samples, manifest.tokens, given, "model.vocab_size", manifest)
    return CorpusFacts(path, samples, manifest.tokens, size, "corpus", manifest)


def _vocabulary(
    cfg: RunConfig,
) -> tuple[int, Literal["model.vocab_size", "data.tokenizer", "assumed"]]:
    if cfg.model.vocab_size is not None:
        return cfg.model.vocab_size, "model.vocab_size"
    if cfg.data.tokenizer is not None and Path(cfg.data.tokenizer).is_file():
        from lmscale.tokenizer.tokenizer import Tokenizer

        return Tokenizer.load(Path(cfg.data.tokenizer)).vocab_size, "data.tokenizer"
    return ASSUMED_VOCAB, "assumed"


def node_facts(
    cfg: RunConfig,
    corpus: CorpusFacts,
    topology: PlannedTopology,
    resume: PlannedResume,
    *,
    steps: int,
) -> dict[str, Any] | None:
    """What the nodes read in the remaining steps, at most to the end of the epoch.

    None without a corpus or without steps. Numbers are [minimum, maximum] over the nodes.
    """
    manifest, seq_len = corpus.manifest, cfg.train.seq_len
    if manifest is None or steps <= resume.step:
        return None
    from lmscale.corpus.order import Order
    from lmscale.corpus.shares import BatchSplit, ChunkLayout, node_shares

    order = Order(
        manifest.num_samples(seq_len),
        manifest.samples_per_chunk(seq_len),
        resume.streams,
        window_chunks=cfg.data.shuffle_window_chunks,
        seed=cfg.train.seed,
    )
    split = BatchSplit(
        cfg.train.global_batch_size, topology.nodes, topology.ranks_per_node, topology.mesh.tp
    )
    shares = node_shares(
        order,
        ChunkLayout.of(manifest),
        split,
        steps=steps - resume.step,
        position=resume.position,
    )
    ranges = {
        name: [int(values.min()), int(values.max())]
        for name, values in (
            ("samples", shares.samples),
            ("chunks", shares.chunks),
            ("shards", shares.shards),
            ("bytes", shares.bytes),
        )
    }
    return {
        "steps": shares.steps,
        **ranges,
        "of_shards": len(manifest.shards),
        "shared_chunks": shares.shared_chunks,
        "idle_nodes": len(shares.idle),
        "streams_stay": shares.streams_stay,
        "exact": shares.exact,
    }


def data_rows(cfg: RunConfig, steps: str | None, env: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One row per sample of the steps A:B (both included, from 1; all steps without). Raises ConfigError."""
    from lmscale.corpus.manifest import corpus_folder
    from lmscale.corpus.order import Order
    from lmscale.corpus.reader import CorpusReader
    from lmscale.corpus.schedule import plan_rows

    topology, resume = planned_topology(cfg, env), resume_point(cfg)
    reader = CorpusReader(
        corpus_folder(Path(cfg.data.corpora[0].path)), seq_len=cfg.train.seq_len, memory_bytes=0
    )
    if reader.num_samples == 0:
        raise DataError(f"{reader.path} contains no sample of {cfg.train.seq_len} tokens")
    order = Order(
        reader.num_samples,
        reader.samples_per_chunk,
        resume.streams,
        window_chunks=cfg.data.shuffle_window_chunks,
        seed=cfg.train.seed,
    )
    last = total_steps(cfg, lambda: reader.num_samples, step=resume.step, position=resume.position)
    rows = plan_rows(
        reader,
        order,
        steps=_steps(steps, last),
        phases=resume.phases,
        dp_size=topology.mesh.dp,
        tp_size=topology.mesh.tp,
    )
    return (dict(row) for row in rows)


def row_text(row: dict[str, Any]) -> str:
    """A row as text for people."""
    return (
        f"{row['position']:>10}  epoch {row['epoch']}  sample {row['sample']:>8}  "
        f"rank {row['rank']:>4}  {row['shard']} at {row['offset']}, {row['bytes']} bytes"
    )


def _steps(text: str | None, last: int) -> range:
    match = re.fullmatch(r"(\d+):(\d+)", text or f"1:{last}")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        hint = "write first:last, both included, from 1, e.g. 1:10"
        raise ConfigError([Problem("--steps", f"cannot read {text!r}", hint)])
    return range(int(match[1]), int(match[2]) + 1)
