"""How many samples a run file's corpus has, without torch: what the length of a run in epochs needs."""

from pathlib import Path

from lmscale.config.run import RunConfig


def corpus_samples(cfg: RunConfig) -> int:
    """Samples of the training corpus. Raises DataError."""
    from lmscale.corpus.manifest import load_part

    _, manifest = load_part(Path(cfg.data.corpora[0].path))
    return manifest.num_samples(cfg.train.seq_len)
