"""The dynamic loss scale of fp16: as large as gradients bear (arXiv:1710.03740, section 3.2)."""

import torch
from torch import Tensor

_FIRST = 2.0**16
_GROWTH, _BACKOFF = 2.0, 0.5
_CLEAN_STEPS = 2000  # in a row, before the scale grows
_SMALLEST = 1.0


class LossScale:
    """A power of two that the loss is multiplied by and the gradients, in fp32, are divided by.

    It lives on the device: nobody waits to learn whether a step was clean. The same on every rank, because
    it follows from StepResult.applied alone. The count of clean steps is not saved: after a resume the scale
    grows later, which changes no gradient that is neither too large nor too small for fp16.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), _FIRST, dtype=torch.float32, device=device)
        self._clean = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide them, in place."""
        torch._foreach_mul_(gradients, self.scale.reciprocal().to(gradients[0].device))

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """After a step: halve where it was skipped, double after enough that were not."""
        skipped = (~applied).to(torch.float32)
        torch._amp_update_scale_(self.scale, self._clean, skipped, _GROWTH, _BACKOFF, _CLEAN_STEPS)
        self.scale.clamp_(min=_SMALLEST)

    def resume(self, value: float) -> None:
        """Go on with the scale of an earlier run."""
        self.scale.fill_(value)
        self._clean.zero_()
