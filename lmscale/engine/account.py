"""The books of one optimizer step: who counts what, and what is divided by what.

    gradient = d(sum of losses) / d(parameters) / weight of all targets

The weight is known before the first backward, so the loss is scaled there and no gradient is ever
rescaled to normalise it: that would overflow in reduced precision, and be forgotten under accumulation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmscale.batch import Batch
from lmscale.dist.mesh import Mesh
from lmscale.dist.reduce import sum_over
from lmscale.engine.protocol import StepResult
from lmscale.errors import DataError

# What torch.nn.utils.clip_grad_norm_ adds to the norm, so that results compare with plain loops.
_CLIP_EPSILON = 1e-6


def count_targets(micro_batches: Sequence[Batch[Tensor]], mesh: Mesh) -> Tensor:
    """Weight of the targets of this step over all ranks, float64. One small all-reduce."""
    weights = [batch.weights_BL.sum(dtype=torch.float64) for batch in micro_batches]
    weight = _over_ranks(torch.stack(weights).sum(), mesh)
    # On a GPU the look would wait for the device; there the step ends as not applied, with weight 0.
    if weight.device.type == "cpu" and not weight > 0:
        raise DataError(
            "this optimizer step has no target on any rank: every weight is 0; "
            "look at its samples with `lmscale plan RUN --data --steps A:B`"
        )
    return weight


def close(losses: Sequence[Tensor], weight: Tensor, squares: Tensor, mesh: Mesh) -> StepResult:
    """The result of a step from each rank's sums. One small all-reduce, of loss and norm together.

    losses: this rank's sums of nats, one a micro-batch. squares: this rank's share of the squared
    gradient norm, float64; ranks that hold the same gradient hand in equal parts of it.
    """
    nats = torch.stack([loss.double() for loss in losses]).sum()
    total = _over_ranks(torch.stack([nats, squares]), mesh)
    norm = total[1].sqrt()
    return StepResult(total[0] / weight, weight, norm, norm.isfinite() & (weight > 0))


def clip(gradients: Sequence[Tensor], result: StepResult, largest: float | None) -> None:
    """Scale the gradients down, in place, to the largest allowed norm. Never waits for the device."""
    if largest is None:
        return
    factor = (largest / (result.grad_norm + _CLIP_EPSILON)).clamp(max=1.0)
    torch._foreach_mul_(list(gradients), factor)


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


def _over_ranks(values: Tensor, mesh: Mesh) -> Tensor:
    return values if mesh.dp_size == 1 else sum_over(values, mesh.dp_group)
