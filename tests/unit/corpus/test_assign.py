from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.corpus.order import chunks_in_use, num_micro_batches, step_positions, wasted_frac

counts = st.integers(1, 40)


def shares(position: int, batch: int, streams: int, size: int) -> list[list[int]]:
    return [
        step_positions(
            position, global_batch_size=batch, streams=streams, dp_rank=rank, dp_size=size
        ).tolist()
        for rank in range(size)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**13), counts, counts, counts)
def test_shares_are_the_sorted_batch_cut_by_the_formula(
    position: int, batch: int, streams: int, size: int
) -> None:
    ordered = sorted(range(position, position + batch), key=lambda p: (p % streams, p))
    want: list[list[int]] = [[] for _ in range(size)]
    for index, p in enumerate(ordered):
        want[index * size // batch].append(p)
    assert shares(position, batch, streams, size) == want


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), counts, counts, counts, st.integers(1, 9))
def test_shares_differ_by_at_most_one_and_fit_the_micro_batches(
    position: int, batch: int, streams: int, size: int, micro: int
) -> None:
    sizes = [len(share) for share in shares(position, batch, streams, size)]
    assert max(sizes) - min(sizes) <= 1
    rows = num_micro_batches(batch, size, micro) * micro
    assert rows - micro < max(sizes) <= rows
    assert wasted_frac(batch, size, micro) == 1 - sum(sizes) / (rows * size)


def test_a_rank_keeps_its_lanes_when_the_batch_is_the_streams() -> None:
    for size in (1, 2, 3, 5, 8):
        first = shares(0, 24, 24, size)
        for step in (1, 2, 7):
            later = shares(24 * step, 24, 24, size)
            assert [[p % 24 for p in share] for share in later] == first


def test_window_chunks_of_the_largest_share() -> None:
    assert chunks_in_use(streams=10, dp_size=4, window_chunks=16) == 48
