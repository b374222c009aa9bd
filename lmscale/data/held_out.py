"""Held-out batches: a corpus in order, each sample exactly once for any number of ranks."""

from collections.abc import Iterator

import numpy as np

from lmscale.batch import Batch
from lmscale.corpus.reader import Reader
from lmscale.data.objective import Documents, Record, causal


def held_out(
    reader: Reader,
    *,
    documents: Documents,
    micro_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_samples: int | None = None,
) -> Iterator[Batch[np.ndarray]]:
    """This rank's contiguous share of the first `max_samples` samples (None: all).

    Every rank yields the same number of batches, the last ones filled with rows without targets, so that
    collectives match. A last piece shorter than seq_len belongs to no sample, as in training.
    """
    total = reader.num_samples if max_samples is None else min(max_samples, reader.num_samples)
    first, last = (-(-total * rank // dp_size) for rank in (dp_rank, dp_rank + 1))
    largest = -(-total // dp_size)
    for index in range(-(-largest // micro_batch)):
        begin = min(first + index * micro_batch, last)
        mine = np.arange(begin, min(begin + micro_batch, last), dtype=np.int64)
        yield causal(
            [Record(*reader.row(int(sample))) for sample in mine],
            rows=micro_batch,
            positions=mine,
            seq_len=reader.seq_len,
            documents=documents,
        )
