"""Which parameters decay, and that the optimizer has the settings of the run file."""

import pytest
import torch
from torch import nn

from lmscale.config.schema import OptimConfig
from lmscale.optim.optimizer import build_adamw, parameter_groups


def parameters():
    g = torch.Generator().manual_seed(0)
    shapes = {"table": (6, 4), "norm": (4,), "linear": (4, 4), "bias": (4,)}
    return {name: nn.Parameter(torch.randn(s, generator=g)) for name, s in shapes.items()}


def test_matrices_decay_and_vectors_do_not():
    named = parameters()
    decays, stays = parameter_groups(named.items(), 0.3)
    assert decays["weight_decay"] == 0.3
    assert stays["weight_decay"] == 0.0
    assert [id(p) for p in decays["params"]] == [id(named[n]) for n in ("table", "linear")]
    assert [id(p) for p in stays["params"]] == [id(named[n]) for n in ("norm", "bias")]


def test_an_empty_group_is_left_out():
    named = parameters()
    (only,) = parameter_groups([("norm", named["norm"])], 0.3)
    assert only["weight_decay"] == 0.0
    assert parameter_groups([], 0.3) == []


@pytest.mark.parametrize("fused", [False, True])
def test_updates_are_adamws(fused):
    """Against the paper's formulas, for three steps whose learning rates differ."""
    cfg = OptimConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    named = parameters()
    want = {name: p.detach().clone().double() for name, p in named.items()}
    first = {name: torch.zeros_like(p) for name, p in want.items()}
    second = {name: torch.zeros_like(p) for name, p in want.items()}
    optimizer = build_adamw(parameter_groups(named.items(), cfg.weight_decay), cfg, fused=fused)
    g = torch.Generator().manual_seed(1)
    for step, lr in enumerate([0.1, 0.05, 0.2], start=1):
        for name, parameter in named.items():
            parameter.grad = torch.randn(parameter.shape, generator=g)
            gradient = parameter.grad.double()
            decay = 0.3 if parameter.ndim == 2 else 0.0
            first[name].mul_(0.8).add_(gradient, alpha=0.2)
            second[name].mul_(0.9).add_(gradient.square(), alpha=0.1)
            root = (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            want[name] -= lr * (decay * want[name] + first[name] / (1 - 0.8**step) / root)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach().double(), want[name], rtol=1e-5, atol=1e-6)
