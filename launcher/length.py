"""How long a run is, from the run file and, for epochs, its corpus."""

from pathlib import Path

from lmscale.config.run import RunConfig


def total_steps(cfg: RunConfig, num_samples: int | None = None) -> int:
    """Optimizer steps of the whole run, rounded up to whole steps.

    `num_samples`: of the training corpus; read from its manifest where it is needed and not given.
    """
    if cfg.train.steps is not None:
        return cfg.train.steps
    if cfg.train.tokens is not None:
        samples: float = -(-cfg.train.tokens // cfg.train.seq_len)
    else:
        assert cfg.train.epochs is not None, "the run file was checked to have one of the three"
        samples = cfg.train.epochs * (corpus_samples(cfg) if num_samples is None else num_samples)
    return max(1, int(-(-samples // cfg.train.global_batch)))


def corpus_samples(cfg: RunConfig) -> int:
    """Samples of the training corpus. Raises DataError."""
    from lmscale.corpus.manifest import Manifest, resolve

    return Manifest.load(resolve(Path(cfg.data.corpora[0].path))).num_samples(cfg.train.seq_len)
