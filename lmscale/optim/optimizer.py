"""The optimizer: which parameters decay, and torch's AdamW with our settings."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmscale.config.schema import OptimConfig


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups, in the parameters' order: those that decay, and those that do not.

    Matrices decay, embeddings included (as in nanoGPT and litgpt); norms and biases do not. The
    rule reads the number of dimensions, never a name, so it holds for any layout that keeps it.
    A group without parameters is left out: some engines refuse an empty one.
    """
    named = list(named_parameters)
    matrices = [parameter for _, parameter in named if parameter.ndim >= 2]
    vectors = [parameter for _, parameter in named if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(
    groups: Sequence[dict[str, Any]], cfg: OptimConfig, *, fused: bool
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101). The learning rate is set by the engine before every step.

    fused: one kernel for all parameters, on CPUs too. False for tensors it does not take (DTensors
    of several meshes, fake tensors).
    """
    return torch.optim.AdamW(
        list(groups), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=0.0, fused=fused
    )
