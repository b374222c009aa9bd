"""Which bytes of which shard each rank reads in which step: what `lmscale plan --data` prints."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of one global batch, from where it was set on."""

    global_batch: int
    step: int = 0  # steps done before it
    position: int = 0  # samples consumed before it


def begin_of(step: int, phases: Sequence[Phase]) -> tuple[int, int]:
    """Where a step begins, and its batch. Step 1 is the first; phases are in their order."""
    phase = next(one for one in reversed(phases) if one.step < step)
    return phase.position + (step - 1 - phase.step) * phase.global_batch, phase.global_batch


def rows(
    reader: Reader,
    order: Order,
    *,
    steps: range,
    phases: Sequence[Phase],
    dp_size: int,
    tp_size: int = 1,
) -> Iterator[PlanRow]:
    """The samples of `steps`, each step's in order of position.

    `phases`: one, Phase(global_batch), for a run whose batch has always been the same. Ranks are those of
    `dp_size`, also for steps that other numbers of ranks have computed. Reads the indexes of the shards that
    hold the samples, no tokens. Raises DataError.
    """
    for step in steps:
        start, global_batch = begin_of(step, phases)
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
