"""Norms in float64 and clipping, without ranks."""

import math

import pytest
import torch

from lmscale.engine.step import StepResult, clip_gradients, sum_of_squares

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(), (0,), (1,), (255,), (257,), (40, 13), (3, 0), (700, 300)])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-7), (torch.float64, 1e-14)])
def test_squares_are_summed_in_float64(shape, dtype, within):
    draw = torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, dtype=dtype, generator=draw)
    found = sum_of_squares([tensor, tensor.mT if tensor.ndim == 2 else tensor], CPU)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(2 * tensor.double().square().sum().item(), rel=within)


def test_a_long_sum_does_not_drift():
    tensor = torch.full((1 << 20,), 0.1)
    exact = len(tensor) * float(tensor[0].double()) ** 2
    assert sum_of_squares([tensor], CPU).item() == pytest.approx(exact, rel=3e-7)
    in_fp32 = torch._foreach_norm([tensor], 2)[0].double().square().item()
    assert in_fp32 != pytest.approx(exact, rel=3e-6), "no longer worth the trouble"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_is_seen(bad):
    tensor = torch.ones(1000)
    tensor[777] = bad
    assert not sum_of_squares([tensor], CPU).isfinite()


def test_nothing_has_a_norm_of_zero():
    assert sum_of_squares([], CPU).item() == 0


@pytest.mark.parametrize(
    ("largest", "scale"), [(2.5, 0.5), (5.1, 1.0), (None, 1.0)], ids=["clipped", "small", "off"]
)
def test_clipping_scales_to_the_largest_norm(largest, scale):
    gradients = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    one = torch.ones((), dtype=torch.float64)
    result = StepResult(one, one, grad_norm=5 * one, applied=one > 0)
    clip_gradients(gradients, result, largest)
    assert [g.item() for g in gradients] == pytest.approx([3 * scale, 4 * scale], rel=1e-6)
