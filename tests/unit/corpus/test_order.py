import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.corpus.order import VERSION, Order, feistel_permutation, round_keys
from tests.support.order_reference import Reference

GOLDEN = Path(__file__).parents[2] / "golden" / "order.json"

sizes = st.one_of(st.integers(1, 60), st.integers(1, 5000), st.integers(1, 10**12))
orders = st.builds(
    Order,
    sizes,
    st.one_of(st.integers(1, 40), st.integers(1, 1 << 20)),
    streams=st.one_of(st.integers(1, 9), st.integers(1, 5000)),
    window_chunks=st.integers(1, 20),
    seed=st.integers(-(2**63), 2**63 - 1),
    corpus=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(orders, st.lists(st.integers(0, 3 * 10**12), min_size=1, max_size=12), st.data())
def test_order_equals_its_formulas(order: Order, far: list[int], data: st.DataObject) -> None:
    near = data.draw(st.integers(0, 3 * order.num_samples))
    end = order.num_samples
    positions = [*far, *range(near, near + 12), end - 1, end, max(0, end - order.streams)]
    want = Reference(
        order.num_samples,
        order.samples_per_chunk,
        order.streams,
        order.window_chunks,
        order.seed,
        order.corpus,
    )
    epochs, samples = order.samples_at(np.array(positions))
    assert epochs.dtype == samples.dtype == np.int64
    got = list(zip(epochs.tolist(), samples.tolist(), strict=True))
    assert got == [want.samples_at(position) for position in positions]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 900),
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_every_epoch_is_a_permutation(n: int, k: int, streams: int, window: int, seed: int) -> None:
    epochs, samples = Order(n, k, streams, window, seed).samples_at(np.arange(3 * n))
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(n)]
    for epoch in range(3):
        assert sorted(samples[epochs == epoch].tolist()) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(0, 9))
def test_bijections_of_many_sizes_at_once(sizes: list[int], seed: int) -> None:
    n = np.repeat(sizes, sizes)
    x = np.concatenate([np.arange(size) for size in sizes])
    which = np.repeat(np.arange(len(sizes)), sizes)
    y = feistel_permutation(x, n=n, keys=round_keys(seed, "window", 0, which))
    for number, size in enumerate(sizes):
        assert sorted(y[which == number].tolist()) == list(range(size))


@pytest.mark.parametrize("n", [2**53 - 1, 2**53 + 1, 2**60 - 1, 2**61])
def test_bijection_does_not_round_at_large_sizes(n: int) -> None:
    x = np.array([0, 1, n // 2, n - 1])
    keys = round_keys(0, "chunk", 0, np.zeros(4, dtype=np.int64))
    y = feistel_permutation(x, n=np.full(4, n), keys=keys)
    assert len(set(y.tolist())) == 4
    assert ((y >= 0) & (y < n)).all()


def test_each_lane_owns_whole_chunks_and_stays_in_its_window() -> None:
    order = Order(num_samples=64 * 8 + 3, samples_per_chunk=8, streams=4, window_chunks=2, seed=5)
    positions = np.arange(64 * 8)
    _, samples = order.samples_at(positions)
    owners: dict[int, set[int]] = {}
    for position, sample in zip(positions.tolist(), samples.tolist(), strict=True):
        owners.setdefault(sample // 8, set()).add(position % 4)
    assert len(owners) == 64
    assert all(len(lanes) == 1 for lanes in owners.values())
    for lane in range(4):
        chunks = samples[positions % 4 == lane].reshape(-1, 2 * 8) // 8
        assert all(len(set(window.tolist())) == 2 for window in chunks)


def test_epochs_seeds_and_corpora_have_different_orders() -> None:
    positions = np.arange(500)
    base = Order(1000, 8, 4).samples_at(positions)[1]
    others = [
        Order(1000, 8, 4).samples_at(positions + 1000)[1],
        Order(1000, 8, 4, seed=1).samples_at(positions)[1],
        Order(1000, 8, 4, corpus=1).samples_at(positions)[1],
    ]
    for other in others:
        assert np.mean(base == other) < 0.02


def test_shuffle_is_uniform_over_the_corpus() -> None:
    """The mean of a window's samples, over many seeds, is that of the corpus."""
    n = 4096
    means = [
        Order(n, 16, 8, 4, seed).samples_at(np.arange(256))[1].mean() / (n - 1)
        for seed in range(40)
    ]
    assert abs(np.mean(means) - 0.5) < 0.03  # 5 standard deviations for 16 chunks a call


def test_no_positions_and_one_sample() -> None:
    epochs, samples = Order(1, 1, 1).samples_at(np.array([], dtype=np.int64))
    assert len(epochs) == len(samples) == 0
    epochs, samples = Order(1, 7, 3).samples_at(np.arange(4))
    assert (epochs.tolist(), samples.tolist()) == ([0, 1, 2, 3], [0, 0, 0, 0])


def test_order_is_the_one_of_the_golden_file() -> None:
    """Pins the order for ever: a run must go on under any later version. Never rewrite the file."""
    golden = json.loads(GOLDEN.read_text())
    assert golden["version"] == VERSION
    for case in golden["cases"]:
        first = case["first_position"]
        constants = dict(case["order"])
        order = Order(window_chunks=constants.pop("window"), **constants)
        epochs, samples = order.samples_at(np.arange(first, first + case["count"]))
        shown = len(case["samples"])
        assert samples[:shown].tolist() == case["samples"]
        assert epochs[:shown].tolist() == case["epochs"]
        both = np.stack((epochs, samples), axis=1).astype("<i8").tobytes()
        assert hashlib.sha256(both).hexdigest() == case["sha256"]
