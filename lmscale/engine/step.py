"""The books of one optimizer step: who counts what, and what is divided by what.

    gradient = d(sum of losses) / d(parameters) / weight of all targets

The weight is known before the first backward, so the loss is scaled there and no gradient is ever
rescaled to normalise it: that would overflow in reduced precision, and be forgotten under accumulation.

What every engine asks of torch's AdamW: moments from the start, a step that can be skipped on the device.

The fused AdamW takes the flag of torch's GradScaler: with `found_inf` set its kernel leaves weights,
moments and step counters alone, on any device, without the host looking. So a step with a gradient that
is not finite costs nothing to skip, and nothing is undone.

The dynamic loss scale of fp16: as large as gradients bear (arXiv:1710.03740, section 3.2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmscale.base.batch import Batch
from lmscale.base.errors import DataError
from lmscale.distributed.mesh import Mesh
from lmscale.distributed.process_group import sum_over
from lmscale.engine.base import StepResult

# What torch.nn.utils.clip_grad_norm_ adds to the norm, so that results compare with plain loops.
_CLIP_EPSILON = 1e-6


def count_targets(micro_batches: Sequence[Batch[Tensor]], mesh: Mesh) -> Tensor:
    """Weight of the targets of this step over all ranks, float64. One small all-reduce over dp."""
    weights = [batch.weights_BL.sum(dtype=torch.float64) for batch in micro_batches]
    weight = torch.stack(weights).sum()
    if mesh.dp_size > 1:
        weight = sum_over(weight, mesh.dp_group)
    # On a GPU the look would wait for the device; there the step ends as not applied, with weight 0.
    if weight.device.type == "cpu" and not weight > 0:
        raise DataError(
            "this optimizer step has no target on any rank: every weight is 0; "
            "look at its samples with `lmscale plan RUN --data --steps A:B`"
        )
    return weight


def close(losses: Sequence[Tensor], weight: Tensor, squares: Tensor, mesh: Mesh) -> StepResult:
    """The result of a step from each rank's sums. One small all-reduce over all ranks, of loss and norm together.

    losses: this rank's sums of nats, one a micro-batch, the same on the ranks of a tp group. squares: this rank's
    share of the squared gradient norm, float64: ranks that hold the same element hand in equal parts of it. More
    than one number: the squares of several parts of the model, whose sum is the whole; see StepResult.norms.
    """
    nats = torch.stack([loss.double() for loss in losses]).sum() / mesh.tp_size
    total = torch.cat([nats[None], squares.reshape(-1)])
    if mesh.world.size > 1:
        total = sum_over(total)
    norm = total[1:].sum().sqrt()
    parts = total[1:].sqrt() if squares.dim() else None
    return StepResult(total[0] / weight, weight, norm, norm.isfinite() & (weight > 0), parts)


def sum_partial(gradients: Sequence[Tensor], mesh: Mesh) -> None:
    """Add up over the tp ranks, in place, gradients that cover only this rank's tokens. One all-reduce.

    Of norms, row biases and the position table under sequence parallelism (model/plan.py, sums_over_tokens).
    Once a step, after the last micro-batch: reductions over dp and over tp commute.
    """
    if not gradients or mesh.tp_size == 1:
        return
    summed = sum_over(torch.cat([gradient.reshape(-1) for gradient in gradients]), mesh.tp_group)
    parts = summed.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def clip(gradients: Sequence[Tensor], result: StepResult, largest: float | None) -> None:
    """Scale the gradients down, in place, to the largest allowed norm. Never waits for the device."""
    if largest is None or not gradients:
        return
    factor = (largest / (result.grad_norm + _CLIP_EPSILON)).clamp(max=1.0)
    # In the gradients' own type: a factor of another one costs a kernel a tensor instead of one for all.
    torch._foreach_mul_(list(gradients), factor.to(gradients[0].dtype))


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of all elements, summed in float64: an fp32 sum over millions is off by 5e-5 (a 17M model).

    On a CPU rows of 256 are summed in the tensors' own precision first, which is seven times faster
    and off by 1e-9 (2e-7 where every rounding goes the same way).
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cpu":
        return torch.stack([_squares_by_rows(tensor) for tensor in tensors]).sum()
    return torch.stack(torch._foreach_norm(list(tensors), 2, torch.float64)).square().sum()


def _squares_by_rows(tensor: Tensor, width: int = 256) -> Tensor:
    flat = tensor.reshape(-1)
    whole = flat.numel() // width * width
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, width), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return rows.double().square().sum() + rest.double().square()


MOMENTS = ("exp_avg", "exp_avg_sq")


def materialise(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its moments now, so that there is something to save or to load into."""
    for parameter in _parameters(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS},
        }


def prepare(optimizer: torch.optim.Optimizer, *, lr: float, applied: Tensor) -> None:
    """Set what the next `optimizer.step()` needs; with `applied` False it will do nothing."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    # torch would move the flag to the CPU without waiting for it, and read it before it is there.
    home = _parameters(optimizer)[0].device
    optimizer.found_inf = (~applied).to(home, torch.float32)  # type: ignore[attr-defined]


def count(optimizer: torch.optim.Optimizer) -> int:
    """Updates applied so far. Waits for the device."""
    return int(optimizer.state[_parameters(optimizer)[0]]["step"].item())


def set_count(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """As if `steps` updates had been applied."""
    for parameter in _parameters(optimizer):
        optimizer.state[parameter]["step"].fill_(float(steps))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
