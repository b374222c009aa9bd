"""The loss scale of fp16 follows from which steps were applied, and from nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lmscale.engine.step import LossScale


def scale_of(*applied: bool) -> LossScale:
    scale = LossScale(torch.device("cpu"))
    for one in applied:
        scale.update(torch.tensor(one))
    return scale


@given(st.lists(st.booleans(), max_size=60))
def test_it_halves_at_every_skipped_step_and_never_falls_below_one(applied):
    expected = max(2.0**16 / 2 ** applied.count(False), 1.0)
    assert scale_of(*applied).scale.item() == expected


def test_it_doubles_after_two_thousand_clean_steps_in_a_row():
    assert scale_of(*[True] * 1999).scale.item() == 2.0**16
    assert scale_of(*[True] * 4000).scale.item() == 2.0**18
    assert scale_of(*[True] * 1999, False, *[True] * 1999).scale.item() == 2.0**15


def test_unscaling_is_exact():
    scale = scale_of(False)
    gradients = [torch.randn(5), torch.randn(2, 3)]
    scaled = [gradient * 2.0**15 for gradient in gradients]
    scale.unscale(scaled)
    assert all(torch.equal(*pair) for pair in zip(scaled, gradients, strict=True))


def test_a_resumed_scale_goes_on_where_it_was():
    scale = scale_of(*[True] * 1999)
    scale.resume(8.0)
    scale.update(torch.tensor(True))
    assert scale.scale.item() == 8.0
