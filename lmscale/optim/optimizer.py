"""The optimizer: parameter groups for weight decay, and torch's AdamW with our settings."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmscale.config.schema import OptimConfig
from lmscale.modelspec.parameters import decays


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups, in the parameters' order: those that decay, and those that do not.

    lmscale.modelspec.parameters.decays is the rule. A group without parameters is left out, because some
    engines refuse an empty one.
    """
    named = list(named_parameters)
    matrices = [parameter for _, parameter in named if decays(parameter.ndim)]
    vectors = [parameter for _, parameter in named if not decays(parameter.ndim)]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(
    groups: Sequence[dict[str, Any]], cfg: OptimConfig, *, fused: bool
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101). The engine sets the learning rate before every step.

    fused: one kernel for all parameters, on CPUs too. False for tensors that it does not support (DTensors
    of several meshes, fake tensors).
    """
    return torch.optim.AdamW(
        list(groups), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=0.0, fused=fused
    )
