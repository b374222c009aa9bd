"""The learning rate: its corners, its shape, and no memory."""

from math import cos, pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.config.schema import OptimConfig
from lmscale.optim.learning_rate import lr_at, steps_of

schedules = st.sampled_from(["cosine", "wsd", "constant"])
amounts = st.one_of(st.integers(0, 50), st.integers(0, 100).map(lambda n: f"{n}%"), st.just("0.5%"))


def config(**changes):
    return OptimConfig(**{"lr": 2.0, "final_lr_frac": 0.1, **changes})


def curve(total, **changes):
    cfg = config(**changes)
    return [lr_at(step, cfg, total) for step in range(1, total + 1)]


def test_warm_up_is_a_line_that_ends_at_the_peak():
    assert curve(8, schedule="constant", warmup_steps=4) == [0.5, 1.0, 1.5, 2, 2, 2, 2, 2]


def test_cosine_halves_midway_and_ends_at_the_final_rate():
    lrs = curve(10, schedule="cosine", warmup_steps=2)
    assert lrs[:2] == [1.0, 2.0]
    assert lrs[5] == pytest.approx((2.0 + 0.2) / 2)  # step 6: half of the 8 steps after warm-up
    assert lrs[3] == pytest.approx(0.2 + 1.8 * (1 + cos(pi / 4)) / 2)
    assert lrs[-1] == pytest.approx(0.2)


def test_wsd_is_flat_then_a_line():
    lrs = curve(10, schedule="wsd", warmup_steps=2, decay_steps=4, final_lr_frac=0.2)
    assert lrs == pytest.approx([1, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4])


def test_wsd_decays_from_the_end_of_a_long_warm_up():
    lrs = curve(10, schedule="wsd", warmup_steps=8, decay_steps="50%", final_lr_frac=0.0)
    assert lrs[7:] == pytest.approx([2.0, 1.0, 0.0])


def test_after_the_last_step_the_final_rate_stays():
    cfg = config(schedule="cosine", warmup_steps="5%")
    assert lr_at(500, cfg, 200) == lr_at(200, cfg, 200) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("share", "total", "want"),
    [("5%", 200, 10), ("5%", 2, 1), ("0%", 200, 0), ("0.5%", 201, 2), ("100%", 7, 7), (12, 5, 12)],
)
def test_shares_are_rounded_up_exactly(share, total, want):
    assert steps_of(share, total) == want


def test_a_run_of_two_steps():
    assert curve(2, schedule="cosine", warmup_steps="5%") == [2.0, pytest.approx(0.2)]


def test_an_enormous_run_costs_nothing_and_overflows_nothing():
    total = 10**15
    cfg = config(schedule="cosine", warmup_steps="5%")
    assert lr_at(total // 20, cfg, total) == 2.0
    assert lr_at(total, cfg, total) == pytest.approx(0.2)


@given(kind=schedules, warmup=amounts, decay=amounts, total=st.integers(1, 80))
def test_it_rises_once_then_never_again_within_its_bounds(kind, warmup, decay, total):
    lrs = curve(total, schedule=kind, warmup_steps=warmup, decay_steps=decay)
    peak = min(steps_of(warmup, total), total)
    rise, fall = lrs[: max(peak, 1)], lrs[max(peak - 1, 0) :]
    assert all(0 < lr <= 2.0 for lr in lrs)
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert all(lr >= 0.2 - 1e-12 for lr in lrs[peak:])
