"""What a plan knows of the corpus, or assumes where there is none yet."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.planning.places import Place
from launcher.planning.standing import Standing
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, Problem

if TYPE_CHECKING:  # it loads numpy
    from lmscale.corpus.manifest import Manifest

ASSUMED_VOCAB = 32_000  # Llama's; a model's size should be known before a corpus is prepared


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """The training corpus in numbers; None where it does not exist."""

    path: str
    samples: int | None
    tokens: int | None
    vocab_size: int  # that the model is built for
    vocab_from: Literal["corpus", "model.vocab_size", "data.tokenizer", "assumed"]
    manifest: "Manifest | None" = None  # that of a million shards takes seconds: it is read once


def corpus_facts(cfg: RunConfig) -> CorpusFacts:
    """Numbers of the manifest. Raises ConfigError where it cannot fill a step, DataError where it is damaged."""
    path = cfg.data.corpora[0].path
    if not Path(path).exists():
        return CorpusFacts(path, None, None, *_vocabulary(cfg))
    from lmscale.corpus.manifest import load_part

    _, manifest = load_part(Path(path))
    samples = manifest.num_samples(cfg.train.seq_len)
    if samples < cfg.train.global_batch:
        fact = (
            f"{cfg.train.global_batch} samples a step, but the corpus has {samples} of "
            f"{cfg.train.seq_len} tokens"
        )
        hint = "use fewer, or a larger corpus"
        raise ConfigError([Problem("train.global_batch", fact, hint)])
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
        from lmscale.text.tokenizer import Tokenizer

        return Tokenizer.load(Path(cfg.data.tokenizer)).vocab_size, "data.tokenizer"
    return ASSUMED_VOCAB, "assumed"


def node_facts(
    cfg: RunConfig, corpus: CorpusFacts, place: Place, stands: Standing, *, steps: int
) -> dict[str, Any] | None:
    """What nodes read in the steps to come, at most to the end of the epoch; None: no corpus, or no step.

    Numbers are [fewest, most] of any node.
    """
    manifest, seq_len = corpus.manifest, cfg.train.seq_len
    if manifest is None or steps <= stands.step:
        return None
    from lmscale.corpus.order import Order
    from lmscale.corpus.shares import Layout, Split, node_shares

    order = Order(
        manifest.num_samples(seq_len),
        manifest.samples_per_chunk(seq_len),
        stands.streams,
        window=cfg.data.shuffle_window,
        seed=cfg.train.seed,
    )
    split = Split(cfg.train.global_batch, place.nodes, place.ranks_per_node, place.mesh.tp)
    found = node_shares(
        order,
        Layout.of(manifest),
        split,
        steps=steps - stands.step,
        position=stands.position,
    )
    ranges = {
        name: [int(values.min()), int(values.max())]
        for name, values in (
            ("samples", found.samples),
            ("chunks", found.chunks),
            ("shards", found.shards),
            ("bytes", found.bytes),
        )
    }
    return {
        "steps": found.steps,
        **ranges,
        "of_shards": len(manifest.shards),
        "shared_chunks": found.shared_chunks,
        "idle_nodes": len(found.idle),
        "streams_stay": found.streams_stay,
        "exact": found.exact,
    }
