"""The arithmetic of one optimizer step, which is the same under every engine.

    gradient = d(sum of losses) / d(parameters) / weight of all targets

The weight is known before the first backward, so the loss is scaled there. No gradient is rescaled
afterwards to normalise it: reduced precision would overflow, and accumulation would need a second rule.

The optimizer is torch's fused AdamW. It takes the `found_inf` flag of torch's GradScaler: where the flag
is set, the kernel leaves weights, moments and step counters unchanged, on any device and without a
synchronisation with the host. A step with a non-finite gradient is skipped that way, and nothing has to
be undone.

fp16 has a dynamic loss scale, as large as the gradients allow (arXiv:1710.03740, section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmscale.base.batch import Batch
from lmscale.base.errors import DataError
from lmscale.distributed.mesh import Mesh
from lmscale.distributed.process_group import sum_over

MOMENTS = ("exp_avg", "exp_avg_sq")
# What torch.nn.utils.clip_grad_norm_ adds to the norm, so that results compare with plain loops.
_CLIP_EPSILON = 1e-6
_FIRST_LOSS_SCALE = 2.0**16
_SMALLEST_LOSS_SCALE = 1.0
_GROWTH, _BACKOFF = 2.0, 0.5
_CLEAN_STEPS = 2000  # consecutive finite steps before the loss scale grows


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one optimizer step: scalars on the device, the same on every rank.

    Reading one waits for the device; read them one step late.
    """

    loss: Tensor  # float64: nats per target over the whole step and all ranks, before the update
    weight: Tensor  # float64: weight of all targets of the step
    grad_norm: Tensor  # float64: of the whole gradient, before clipping
    applied: Tensor  # bool: False when the gradient was not finite and nothing was updated
    norms: Tensor | None = None  # with log.layer_stats: grad_norm of each of Engine.block_names


def count_targets(micro_batches: Sequence[Batch[Tensor]], mesh: Mesh) -> Tensor:
    """Weight of the targets of this step over all ranks, float64. One small all-reduce over dp.

    Raises DataError on a CPU where no rank has a target.
    """
    weights = [batch.weights_BL.sum(dtype=torch.float64) for batch in micro_batches]
    weight = torch.stack(weights).sum()
    if mesh.dp_size > 1:
        weight = sum_over(weight, mesh.dp_group)
    # On a GPU this check would wait for the device; there the step ends as not applied, with weight 0.
    if weight.device.type == "cpu" and not weight > 0:
        raise DataError(
            "this optimizer step has no target on any rank: every weight is 0. "
            "Inspect its samples with `lmscale plan RUN --data --steps A:B`"
        )
    return weight


def reduce_result(
    losses: Sequence[Tensor], weight: Tensor, squares: Tensor, mesh: Mesh
) -> StepResult:
    """The result of a step from each rank's sums. One small all-reduce over all ranks for loss and norm.

    losses: this rank's sums of nats, one per micro-batch, the same on the ranks of a tp group.
    squares: this rank's part of the squared gradient norm, float64; ranks that have the same element
    contribute equal parts of it. A vector contains the squares of several blocks of the model, whose
    sum is the whole; see StepResult.norms.
    """
    nats = torch.stack([loss.double() for loss in losses]).sum() / mesh.tp_size
    total = torch.cat([nats[None], squares.reshape(-1)])
    if mesh.world.size > 1:
        total = sum_over(total)
    norm = total[1:].sum().sqrt()
    norms = total[1:].sqrt() if squares.dim() else None
    return StepResult(total[0] / weight, weight, norm, norm.isfinite() & (weight > 0), norms)


def sum_partial_gradients(gradients: Sequence[Tensor], mesh: Mesh) -> None:
    """Sum over the tp ranks, in place, gradients that cover only this rank's tokens. One all-reduce.

    Under sequence parallelism these are norms, row biases and the position table
    (model/tp_plan.py, sums_over_tokens). Once per step, after the last micro-batch: reductions over dp
    and over tp commute.
    """
    if not gradients or mesh.tp_size == 1:
        return
    summed = sum_over(torch.cat([gradient.reshape(-1) for gradient in gradients]), mesh.tp_group)
    sums = summed.split([gradient.numel() for gradient in gradients])
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.copy_(total.view_as(gradient))


def clip_gradients(gradients: Sequence[Tensor], result: StepResult, max_norm: float | None) -> None:
    """Scale the gradients, in place, so that their global norm is at most `max_norm`.

    Waits for the device only with offload, where the gradients are on another one than the losses.
    """
    if max_norm is None or not gradients:
        return
    factor = (max_norm / (result.grad_norm + _CLIP_EPSILON)).clamp(max=1.0)
    # In the gradients' own type: a factor of another type costs one kernel per tensor instead of one for all.
    torch._foreach_mul_(list(gradients), factor.to(gradients[0].device, gradients[0].dtype))


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of all squared elements in float64: an fp32 sum over millions is off by 5e-5 (a 17M model).

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


def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create the moments of every parameter now, so that there is something to save or to load into."""
    for parameter in _parameters(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS},
        }


def configure_update(optimizer: torch.optim.Optimizer, *, lr: float, applied: Tensor) -> None:
    """Set the learning rate and the skip flag of the next `optimizer.step()`; `applied` False skips it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    # torch would move the flag to the CPU without waiting for it, and read it before it has arrived.
    device = _parameters(optimizer)[0].device
    optimizer.found_inf = (~applied).to(device, torch.float32)  # type: ignore[attr-defined]


def count_updates(optimizer: torch.optim.Optimizer) -> int:
    """Updates applied so far. Waits for the device."""
    return int(optimizer.state[_parameters(optimizer)[0]]["step"].item())


def set_update_count(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set the step counters as if `steps` updates had been applied."""
    for parameter in _parameters(optimizer):
        optimizer.state[parameter]["step"].fill_(float(steps))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class LossScale:
    """A power of two that the loss is multiplied by and the gradients, in fp32, are divided by.

    It is a tensor on the device, so no step waits to learn whether it was finite. It is the same on every
    rank, because it follows from StepResult.applied alone. The count of finite steps is not saved: after
    a resume the scale grows later, which changes no gradient that fp16 can represent.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), _FIRST_LOSS_SCALE, dtype=torch.float32, device=device)
        self._clean_steps = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide the gradients, in place."""
        factor = self.scale.reciprocal().to(gradients[0].device)
        torch._foreach_mul_(list(gradients), factor)

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """After a step: halve the scale if the step was skipped, double it after enough finite steps."""
        skipped = (~applied).to(torch.float32)
        torch._amp_update_scale_(
            self.scale, self._clean_steps, skipped, _GROWTH, _BACKOFF, _CLEAN_STEPS
        )
        self.scale.clamp_(min=_SMALLEST_LOSS_SCALE)

    def resume(self, value: float) -> None:
        """Continue with the scale of an earlier run."""
        self.scale.fill_(value)
        self._clean_steps.zero_()
