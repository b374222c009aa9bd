"""How long a run is, from the run file and, for epochs, the size of its corpus."""

from collections.abc import Callable

from lmscale.config.run import RunConfig


def total_steps(
    cfg: RunConfig, num_samples: Callable[[], int], *, step: int = 0, position: int = 0
) -> int:
    """Optimizer steps of the whole run, rounded up to whole steps.

    `num_samples`: of the training corpus, asked for epochs only. `step` and `position` (samples
    consumed): where the run stands; they count where train.global_batch has changed on the way.
    """
    if cfg.train.steps is not None:
        return cfg.train.steps
    if cfg.train.tokens is not None:
        samples: float = -(-cfg.train.tokens // cfg.train.seq_len)
    else:
        assert cfg.train.epochs is not None, "the run file was checked to have one of the three"
        samples = cfg.train.epochs * num_samples()
    left = max(0, int(-(-(samples - position) // cfg.train.global_batch)))
    return max(1, step + left)
