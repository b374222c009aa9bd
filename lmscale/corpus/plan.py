"""Which bytes of which shard each rank reads in which step: what `lmscale plan --data` prints."""

from collections.abc import Iterator
from typing import TypedDict

import numpy as np

from lmscale.corpus.assign import step_positions
from lmscale.corpus.feistel import Ints
from lmscale.corpus.order import Order
from lmscale.corpus.reader import Reader


class PlanRow(TypedDict):
    """One sample of one step."""

    position: int  # global, from 0
    corpus: int  # index in data.corpora
    epoch: int
    sample: int
    rank: int  # that computes it (of a tensor-parallel group the first)
    shard: str  # path of the tar
    offset: int  # of its seq_len + 1 tokens in that file
    bytes: int


def rows(
    reader: Reader,
    order: Order,
    *,
    steps: range,
    global_batch: int,
    dp_size: int,
    tp_size: int = 1,
) -> Iterator[PlanRow]:
    """The samples of `steps` (step 1 starts at position 0), each step's in order of position.

    Reads the indexes of the shards that hold them, no tokens. Raises DataError.
    """
    for step in steps:
        start = (step - 1) * global_batch
        positions = np.arange(start, start + global_batch, dtype=np.int64)
        ranks = _dp_ranks(start, global_batch, streams=order.streams, dp_size=dp_size)
        epochs, samples = order.at(positions)
        columns = (positions, epochs, samples, ranks * tp_size)
        for position, epoch, sample, rank in zip(*(c.tolist() for c in columns), strict=True):
            place = reader.locate(sample)
            yield PlanRow(
                position=position,
                corpus=order.corpus,
                epoch=epoch,
                sample=sample,
                rank=rank,
                shard=str(place.shard),
                offset=place.offset,
                bytes=place.bytes,
            )


def _dp_ranks(start: int, global_batch: int, *, streams: int, dp_size: int) -> Ints:
    """The data-parallel rank of each position of a step, by the function that the loader uses."""
    ranks = np.empty(global_batch, dtype=np.int64)
    for rank in range(dp_size):
        mine = step_positions(
            start, global_batch=global_batch, streams=streams, dp_rank=rank, dp_size=dp_size
        )
        ranks[mine - start] = rank
    return ranks
