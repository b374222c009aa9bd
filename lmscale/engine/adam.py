"""What every engine asks of torch's AdamW: moments from the start, a step that can be skipped on the device.

The fused AdamW takes the flag of torch's GradScaler: with `found_inf` set its kernel leaves weights,
moments and step counters alone, on any device, without the host looking. So a step with a gradient that
is not finite costs nothing to skip, and nothing is undone.
"""

import torch
from torch import Tensor

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
