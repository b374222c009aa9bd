"""Attention on a GPU is a compiled region, which is a higher-order operator: recomputation must let it pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.wrap import inductor_compiled_code

from lmscale.parallel.activation_checkpointing import checkpointed

try:
    from torch._higher_order_ops.wrap import InductorCompiledCallable as Compiled
except ImportError:  # before torch 2.13 the operator takes any function

    def Compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


RUNS = []


def _sin(inputs: list[Tensor]) -> tuple[Tensor]:
    RUNS.append("sin")
    return (inputs[0].sin(),)


COMPILED = Compiled(_sin)


class Region(torch.autograd.Function):
    """sin, as a compiled region that counts its runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return inductor_compiled_code(COMPILED, [x])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize(("mode", "runs"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_keeps_what_a_compiled_region_gave(mode: Any, runs: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 4, generator=draw, dtype=torch.float64)
    x = torch.randn(3, 4, generator=draw, dtype=torch.float64).requires_grad_()
    RUNS.clear()
    block = checkpointed(lambda x: Region.apply(torch.relu(x @ weight)) @ weight, mode)
    block(x).sum().backward()
    assert len(RUNS) == runs
    (wanted,) = torch.autograd.grad((torch.relu(x @ weight).sin() @ weight).sum(), x)
    torch.testing.assert_close(x.grad, wanted)
