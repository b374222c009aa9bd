r"""The learning rate of a step: a pure function, so that no state needs saving or restoring.

cosine    warm-up, then half a cosine down to final_lr_frac at the last step (arXiv:1608.03983)
wsd       warm-up, flat, then a straight line down over decay_steps (arXiv:2404.06395)
constant  warm-up, then flat

lr |   ____________
   |  /            \        wsd
   | /              \____   final_lr_frac * lr
   +--|-------------|---|-> step
   warm-up      decay  total
"""

from decimal import Decimal
from math import ceil, cos, pi

from lmscale.config.schema import OptimConfig


def lr_at(step: int, cfg: OptimConfig, total_steps: int) -> float:
    """Learning rate of update number `step`, counted from 1.

    The first step has lr / warmup_steps, step number warmup_steps the full lr, the last step (and
    any after it) final_lr_frac * lr, unless the schedule is constant or warm-up fills the run.
    """
    assert step >= 1, f"steps are counted from 1, not {step}"
    warmup = steps_of(cfg.warmup_steps, total_steps)
    if step <= warmup:
        return cfg.lr * step / warmup
    match cfg.schedule:
        case "constant":
            return cfg.lr
        case "cosine":
            progress = _progress(step, start=warmup, end=total_steps)
            peak_frac = (1 + cos(pi * progress)) / 2
        case "wsd":
            decay = steps_of(cfg.decay_steps, total_steps)
            start = max(warmup, total_steps - decay)
            peak_frac = 1 - _progress(step, start=start, end=total_steps)
        case unknown:
            raise AssertionError(f"schedule {unknown!r} passed the config check")
    return cfg.lr * (cfg.final_lr_frac + (1 - cfg.final_lr_frac) * peak_frac)


def steps_of(value: int | str, total_steps: int) -> int:
    """A number of steps, or a share of all ("5%"), rounded up so that a share is at least one step.

    In decimal arithmetic: 5 % of 200 is 10, where binary floats make it 10.000000000000002.
    """
    if isinstance(value, int):
        return value
    return ceil(Decimal(value.strip().removesuffix("%").strip()) * total_steps / 100)


def _progress(step: int, *, start: int, end: int) -> float:
    """Share of the steps from start to end that is done: 0 until start, 1 from end on."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / (end - start)) if step < end else 1.0
