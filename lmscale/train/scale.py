"""What fp16 multiplies its loss with: an event whenever it has changed, for metrics.jsonl has no place for it."""

from lmscale.engine.protocol import Engine
from lmscale.train.rank import Rank


class LossScale:
    """Watches the engine's scale. Collective."""

    def __init__(self, rank: Rank, engine: Engine) -> None:
        self._rank = rank
        self._engine = engine
        self._every = rank.cfg.log.every_steps if rank.cfg.engine.precision == "fp16" else None
        self._last: float | None = None

    def after_step(self, step: int) -> None:
        """Look every log.every_steps steps, for a look waits for the device."""
        if self._every is None or step % self._every:
            return
        scale = self._engine.loss_scale
        if scale != self._last:
            self._rank.write_event("loss_scale", step=step, scale=scale, before=self._last)
            self._last = scale
