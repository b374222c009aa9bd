"""Which chunks a node reads, in order of first use, and which bytes each rank reads in which step.

Both are derived from the functions by which the ranks read (order.py). The chunks of a node come in two ways:

    by lane           where every stream of the order stays with one node (the streams divide the batch or
                      are divided by it, and most ranks): whole shuffle windows cost one permutation per chunk
    sample by sample  otherwise, and for windows that are read in part and the tail: 0.5 to 1 us per sample

Both work block by block, so that a plan of any length needs a few MB. `plan_rows` is what
`lmscale plan --data` prints.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np

from lmscale.corpus.order import Ints, Order, step_positions
from lmscale.corpus.reader import CorpusReader

_BLOCK = 1 << 16  # chunks or samples computed together
_LONGEST_PERIOD = 1 << 20  # samples after which streams and steps have the same alignment again


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """How a step's batch is divided among nodes: as order.step_positions divides it among ranks."""

    global_batch_size: int
    nodes: int
    ranks_per_node: int
    tp_size: int = 1  # neighbouring ranks that read the same samples

    def __post_init__(self) -> None:
        assert min(self.global_batch_size, self.nodes, self.ranks_per_node, self.tp_size) >= 1, (
            f"{self}"
        )
        assert self.nodes * self.ranks_per_node % self.tp_size == 0, (
            f"{self}: incomplete tensor-parallel groups"
        )

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks."""
        return self.nodes * self.ranks_per_node // self.tp_size

    def cuts(self) -> tuple[Ints, Ints]:
        """[first, stop) of each node's part of a batch that is sorted by (stream, position).

        Parts overlap where a tensor-parallel group spans nodes.
        """
        node = np.arange(self.nodes, dtype=np.int64)
        first_rank = node * self.ranks_per_node // self.tp_size
        stop_rank = -(-(node + 1) * self.ranks_per_node // self.tp_size)
        return (
            -(-self.global_batch_size * first_rank // self.dp_size),
            -(-self.global_batch_size * stop_rank // self.dp_size),
        )

    def readers(self) -> "Readers":
        """The nodes that read each index of a sorted batch."""
        first, stop = self.cuts()
        index = np.arange(self.global_batch_size, dtype=np.int64)
        return Readers(
            np.searchsorted(stop, index, side="right"), np.searchsorted(first, index, side="right")
        )


class Readers(NamedTuple):
    """Nodes [first, stop) that read something; parallel arrays."""

    first: Ints
    stop: Ints


class Reads(NamedTuple):
    """Chunks and the lanes (or indices of the sorted batch) that read them; parallel arrays of distinct pairs."""

    lanes: Ints
    chunks: Ints


class RowRange(NamedTuple):
    """Rows [first, stop) of the lanes in one epoch; row m of lane s is its position m * streams + s."""

    epoch: int
    first: int
    stop: int
    whole: bool  # whole windows of every lane, no tail


def chunks_ahead(
    order: Order, split: BatchSplit, *, node: int, position: int, steps: int
) -> Iterator[Ints]:
    """The chunks that a node reads in `steps` steps from `position` on, in order of first use.

    They come in blocks; a chunk is repeated where a later block reads it again. The first samples of a
    shuffle window touch all its chunks, so these come in the order of the unshuffled window.
    """
    assert 0 <= node < split.nodes, f"node {node} of {split.nodes}"
    owners = stream_readers(split, order.streams, position=position)
    if owners is None:
        first, stop = (int(cut[node]) for cut in split.cuts())
        for reads in step_reads(order, split, position=position, steps=steps):
            mine = (reads.lanes >= first) & (reads.lanes < stop)
            yield _in_order(reads.chunks[mine])
        return
    streams = np.flatnonzero((owners.first <= node) & (node < owners.stop))
    stop = position + steps * split.global_batch_size
    for span, lanes in row_ranges(order, streams, position=position, stop=stop):
        for reads in range_reads(order, span, lanes, position=position, stop=stop):
            yield _in_order(reads.chunks)


def stream_readers(split: BatchSplit, streams: int, *, position: int) -> Readers | None:
    """The nodes that read each stream, [streams]; None where a stream changes its node.

    Steps start at `position`. Streams and steps have the same alignment again after lcm(streams, batch)
    samples; where that period is too long to enumerate, the result is None as well.
    """
    batch = split.global_batch_size
    period = math.lcm(streams, batch)
    if period > _LONGEST_PERIOD:
        return None
    stream = (position + np.arange(period, dtype=np.int64)) % streams
    sorted_streams = np.sort(stream.reshape(-1, batch), axis=1).ravel()
    by_stream = np.argsort(sorted_streams, kind="stable")
    index = by_stream % batch
    readers = Readers(*(nodes[index].reshape(streams, -1) for nodes in split.readers()))
    if any((nodes != nodes[:, :1]).any() for nodes in readers):
        return None
    return Readers(readers.first[:, 0], readers.stop[:, 0])


def row_ranges(
    order: Order, streams: Ints, *, position: int, stop: int
) -> Iterator[tuple[RowRange, Ints]]:
    """The rows of [position, stop) that these streams read, with their lanes in that epoch, ascending."""
    size = order.num_samples
    for epoch in range(position // size, -(-stop // size)) if len(streams) else ():
        start, end = max(position - epoch * size, 0), min(stop - epoch * size, size)
        lanes = np.sort((streams - epoch * size) % order.streams)
        for span in _row_ranges_of_epoch(order, epoch, start, end, int(lanes[0]), int(lanes[-1])):
            if span.first < span.stop:
                yield span, lanes


def range_reads(
    order: Order, span: RowRange, lanes: Ints, *, position: int, stop: int
) -> Iterator[Reads]:
    """What these lanes read of a span, block by block."""
    offset = span.epoch * order.num_samples
    if not span.whole:
        for rows in _blocks(span.first, span.stop, size=max(1, _BLOCK // len(lanes))):
            p = offset + (rows[:, None] * order.streams + lanes).ravel()
            p = p[(p >= position) & (p < min(stop, offset + order.num_samples))]
            chunks = order.samples_at(p)[1] // order.samples_per_chunk
            yield _distinct(Reads((p - offset) % order.streams, chunks))
        return
    k = order.samples_per_chunk
    for slots in _blocks(span.first // k, span.stop // k, size=max(1, _BLOCK // len(lanes))):
        chunks = order.chunks_at((slots[:, None] * order.streams + lanes).ravel(), epoch=span.epoch)
        yield Reads(np.tile(lanes, len(slots)), chunks)


def step_reads(order: Order, split: BatchSplit, *, position: int, steps: int) -> Iterator[Reads]:
    """What each index of the sorted batch reads, sample by sample, one block of steps at a time."""
    batch = split.global_batch_size
    for block in _blocks(0, steps, size=max(1, _BLOCK // batch)):
        p = position + block[:, None] * batch + np.arange(batch, dtype=np.int64)
        sorting = np.argsort(p % order.streams, axis=1, kind="stable")
        chunks = order.samples_at(np.take_along_axis(p, sorting, axis=1).ravel())[1]
        indices = np.tile(np.arange(batch, dtype=np.int64), len(block))
        yield _distinct(Reads(indices, chunks // order.samples_per_chunk))


def _row_ranges_of_epoch(
    order: Order, epoch: int, start: int, end: int, low: int, high: int
) -> Iterator[RowRange]:
    """Divide the positions [start, end) of an epoch; lanes are between `low` and `high`."""
    v, rows = order.streams, order.lane_chunks * order.samples_per_chunk
    window = order.window_chunks * order.samples_per_chunk
    begun = max(0, -(-(start - low) // v))  # before this row some lane may have been read
    done = max(0, (end - 1 - high) // v + 1)  # every lane reaches this row
    first = min(-(-begun // window) * window, rows)
    stop = rows if done >= rows else done // window * window
    last = -(-end // v)
    if stop <= first:
        yield RowRange(epoch, start // v, last, whole=False)
        return
    yield RowRange(epoch, start // v, first, whole=False)
    yield RowRange(epoch, first, stop, whole=True)
    yield RowRange(epoch, stop, last, whole=False)


def _blocks(first: int, stop: int, *, size: int) -> Iterator[Ints]:
    for begin in range(first, stop, size):
        yield np.arange(begin, min(begin + size, stop), dtype=np.int64)


def _distinct(reads: Reads) -> Reads:
    """Each pair once, in order of first use."""
    if not len(reads.chunks):
        return reads
    pairs = reads.lanes * (int(reads.chunks.max()) + 1) + reads.chunks
    kept = np.sort(np.unique(pairs, return_index=True)[1])
    return Reads(reads.lanes[kept], reads.chunks[kept])


def _in_order(chunks: Ints) -> Ints:
    """Each chunk once, in order of first use."""
    return chunks[np.sort(np.unique(chunks, return_index=True)[1])]


class PlanRow(TypedDict):
    """One sample of one step."""

    position: int  # global, from 0
    corpus: int  # index in data.corpora
    epoch: int
    sample: int
    rank: int  # that computes it (the first of its tensor-parallel group)
    shard: str  # path of the tar
    offset: int  # of its seq_len + 1 tokens in that file
    bytes: int


@dataclass(frozen=True, slots=True)
class Phase:
    """Consecutive steps with the same global batch size."""

    global_batch_size: int
    step: int = 0  # steps done before it
    position: int = 0  # samples consumed before it


def step_start(step: int, phases: Sequence[Phase]) -> tuple[int, int]:
    """The first position of a step and its batch size. Step 1 is the first; phases are in order."""
    phase = next(phase for phase in reversed(phases) if phase.step < step)
    return phase.position + (
        step - 1 - phase.step
    ) * phase.global_batch_size, phase.global_batch_size


def plan_rows(
    reader: CorpusReader,
    order: Order,
    *,
    steps: range,
    phases: Sequence[Phase],
    dp_size: int,
    tp_size: int = 1,
) -> Iterator[PlanRow]:
    """The samples of `steps`, each step's in order of position.

    `phases`: a single Phase(global_batch_size) for a run that never changed its batch. Ranks are those of
    `dp_size`, also for steps that other numbers of ranks computed. Reads the indexes of the shards that
    contain the samples, no tokens. Raises DataError.
    """
    for step in steps:
        start, global_batch_size = step_start(step, phases)
        positions = np.arange(start, start + global_batch_size, dtype=np.int64)
        ranks = _dp_ranks(start, global_batch_size, streams=order.streams, dp_size=dp_size)
        epochs, samples = order.samples_at(positions)
        columns = (positions, epochs, samples, ranks * tp_size)
        for position, epoch, sample, rank in zip(*(c.tolist() for c in columns), strict=True):
            location = reader.locate(sample)
            yield PlanRow(
                position=position,
                corpus=order.corpus,
                epoch=epoch,
                sample=sample,
                rank=rank,
                shard=str(location.shard),
                offset=location.offset,
                bytes=location.bytes,
            )


def _dp_ranks(start: int, global_batch_size: int, *, streams: int, dp_size: int) -> Ints:
    """The data-parallel rank of each position of a step, from the function that the loader uses."""
    ranks = np.empty(global_batch_size, dtype=np.int64)
    for rank in range(dp_size):
        mine = step_positions(
            start,
            global_batch_size=global_batch_size,
            streams=streams,
            dp_rank=rank,
            dp_size=dp_size,
        )
        ranks[mine - start] = rank
    return ranks
