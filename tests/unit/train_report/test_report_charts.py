import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.train.report.charts import limits, sample, smooth, thin, wants_log_x

numbers = st.floats(-1e6, 1e6)


@given(st.lists(numbers, min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_smoothing_stays_within_the_values(values: list[float]) -> None:
    found = smooth(np.array(values))
    assert len(found) == len(values)
    slack = 1e-9 * 300 * max(abs(x) for x in values)  # rounding of the running sums
    assert (found >= min(values) - slack).all() and (found <= max(values) + slack).all()


def test_smoothing_averages_the_neighbours_it_says() -> None:
    values = np.random.default_rng(0).normal(size=500)
    found = smooth(values)
    assert found[0] == values[0]  # nothing to average over: the steep first steps stay
    np.testing.assert_allclose(found[100], values[95:106].mean())  # 5 % of the steps so far
    np.testing.assert_allclose(found[300], values[290:311].mean())  # at most 2 % of the run
    np.testing.assert_allclose(found[499], values[489:].mean())  # nothing beyond the end


def test_smoothing_leaves_unknown_values_out() -> None:
    values = np.ones(200)
    values[[50, 120, 199]] = np.nan
    found = smooth(values)
    assert (found[100:] == 1).all()
    assert np.isnan(found[0:1]).sum() == 0
    assert np.isnan(smooth(np.full(10, np.nan))).all()


@given(st.integers(1, 3000), st.integers(1, 50), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_thinning_keeps_the_outline(count: int, buckets: int, log: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = np.arange(1, count + 1), rng.normal(size=count)
    y[rng.integers(count)] = 100.0  # one spike in many steps
    thin_x, thin_y = thin(x, y, buckets=buckets, log=log)
    assert len(thin_x) == len(thin_y) <= 2 * buckets
    assert (np.diff(thin_x) >= 0).all()
    assert thin_y.max() == y.max() and thin_y.min() == y.min()
    assert x[0] <= thin_x[0] and thin_x[-1] <= x[-1]


def test_thinning_shows_a_gap_only_where_a_whole_bucket_is_unknown() -> None:
    y = np.ones(1000)
    y[::2] = np.nan
    assert not np.isnan(thin(np.arange(1, 1001), y, buckets=10)[1]).any()
    y[300:500] = np.nan
    assert np.isnan(thin(np.arange(1, 1001), y, buckets=10)[1]).any()


@given(st.integers(1, 3000), st.integers(1, 50), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_sample_has_both_ends(count: int, buckets: int, log: bool) -> None:
    x = np.arange(1, count + 1)
    found, same = sample(x, x * 2.0, buckets=buckets, log=log)
    assert found[0] == 1 and found[-1] == count and len(found) <= buckets + 1
    assert (same == 2 * found).all()


def test_an_early_drop_asks_for_a_logarithmic_axis() -> None:
    steps = np.arange(1, 10_001)
    assert wants_log_x(steps, 2 + 8 / steps**0.5)
    assert not wants_log_x(steps, 10 - steps / 2000)
    assert not wants_log_x(steps, np.ones(10_000))
    assert not wants_log_x(steps[:60], 2 + 8 / steps[:60] ** 0.5)  # too short to hide anything
    assert not wants_log_x(steps + 50_000, 2 + 8 / steps**0.5)  # less than two decades


def test_limits_cut_and_count_a_spike_but_not_a_rise() -> None:
    steady = np.random.default_rng(0).uniform(1, 2, size=2000)
    steady[77] = 1e9
    found = limits(steady)
    assert found.above == 1 and found.high < 3
    rise = limits(np.linspace(1, 1e9, 2000))
    assert rise.above == 0 and rise.high > 1e9


def test_limits_hold_what_must_be_seen() -> None:
    found = limits(np.array([1.0, 2.0]), also=(5.0, 0.0))
    assert found.low < 0 and found.high > 5
    for nothing in (np.array([]), np.array([np.nan]), np.array([3.0])):
        assert limits(nothing).low < limits(nothing).high
