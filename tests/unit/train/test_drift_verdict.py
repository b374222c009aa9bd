"""What bits differ, and who is to blame: pure functions of digests."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.train.replicas import by_piece, differ, digest, judge

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 3000),
    where=st.integers(0, 10**6),
    bit=st.integers(0, 63),
)
@settings(max_examples=200, deadline=None)
def test_one_flipped_bit_is_always_seen(
    dtype: torch.dtype, size: int, where: int, bit: int
) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    other = tensor.clone()
    raw = other.view(torch.uint8).view(size, -1)
    raw[where % size, bit // 8 % raw.shape[1]] ^= 1 << bit % 8
    assert digest(tensor) != digest(other)
    assert digest(tensor) == digest(tensor.clone())


def test_places_count_also_across_chunks_and_two_flipped_signs_do_not_cancel() -> None:
    tensor = torch.randn(600_000)
    for first, second in ((0, 1), (5, 300_000), (0, 1 << 18), (10, 11)):
        swapped = tensor.clone()
        swapped[[first, second]] = tensor[[second, first]]
        flipped = tensor.clone()
        flipped[[first, second]] *= -1
        assert len({int(digest(one)) for one in (tensor, swapped, flipped)}) == 3
    assert digest(tensor.view(600, 1000).t()) == digest(tensor.view(600, 1000).t().contiguous())
    assert digest(torch.empty(0)) == 0


W, N = "blocks.0.weight", "norm.weight"


@pytest.mark.parametrize(
    ("ranks", "names", "odd", "majority"),
    [
        # three replicas: the odd one
        ([{(W, ""): 1}, {(W, ""): 2}, {(W, ""): 1}], [W], [1], True),
        # two: nobody can say
        ([{(W, ""): 1, (N, ""): 7}, {(W, ""): 2, (N, ""): 7}], [W], [0, 1], False),
        # all differ: no majority either
        ([{(W, ""): 1}, {(W, ""): 2}, {(W, ""): 3}], [W], [0, 1, 2], False),
        # dp 2 x tp 2: the norm, held by four, names the rank that the halves alone cannot
        (
            [
                {(W, "tp 0/2"): 1, (N, ""): 7}, {(W, "tp 1/2"): 2, (N, ""): 7},
                {(W, "tp 0/2"): 1, (N, ""): 7}, {(W, "tp 1/2"): 3, (N, ""): 8},
            ],
            [W, N], [3], True,
        ),
        # pieces that one rank alone holds say nothing
        (
            [{(W, "shard 0/2"): 1, (N, ""): 7}, {(W, "shard 1/2"): 2, (N, ""): 8}],
            [N], [0, 1], False,
        ),
    ],
)  # fmt: skip
def test_the_odd_rank_is_named_by_the_majority(ranks, names, odd, majority) -> None:
    drift = judge(ranks)
    assert drift is not None
    assert (drift.names, drift.ranks, drift.majority) == (sorted(names), odd, majority)
    assert differ([by_piece(one) for one in ranks]), "the cheap look sees it, too"


def test_equal_copies_are_no_drift_however_they_are_spread() -> None:
    ranks = [{(W, f"shard {n}/4"): n, (N, ""): 7} for n in range(4)]
    assert judge(ranks) is None
    assert not differ([by_piece(one) for one in ranks])
    # A rank that holds fewer parameters of a piece: looked at closely, and found sound.
    ranks[0].pop((N, ""))
    ranks[0][W, ""], ranks[1][W, ""] = 3, 3
    assert judge(ranks) is None
