"""Who reads what: the share of each data-parallel rank in a step, without a word between ranks.

A step's batch is the positions [p, p + B). Sorted by (lane, position), rank r of R takes the sorted
indices i with i*R div B == r. Shares differ by at most one for any R; with B = streams a lane, and so
each chunk of an epoch, stays with one rank. That is locality only: the batch is the same set for any R.
"""

import numpy as np

from lmscale.corpus.feistel import Ints


def step_positions(
    position: int, *, global_batch: int, streams: int, dp_rank: int, dp_size: int
) -> Ints:
    """Positions that `dp_rank` computes of the step that starts at `position`, by (lane, position)."""
    assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
    batch = np.arange(position, position + global_batch, dtype=np.int64)
    by_lane = batch[np.argsort(batch % streams, kind="stable")]
    first, stop = (-(-global_batch * rank // dp_size) for rank in (dp_rank, dp_rank + 1))
    return by_lane[first:stop]


def micro_batches(global_batch: int, dp_size: int, micro_batch: int) -> int:
    """Micro-batches a step has on every rank, so that collectives match; some rows may be fillers."""
    largest_share = -(-global_batch // dp_size)
    return -(-largest_share // micro_batch)


def wasted_frac(global_batch: int, dp_size: int, micro_batch: int) -> float:
    """Share of the computed rows that are fillers."""
    computed = micro_batches(global_batch, dp_size, micro_batch) * micro_batch * dp_size
    return 1 - global_batch / computed


def window_chunks(*, streams: int, dp_size: int, window: int) -> int:
    """Chunks a rank reads from at a time: the shuffle windows of its lanes (the largest share)."""
    return -(-streams // dp_size) * window
