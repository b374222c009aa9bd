"""What each node reads of a corpus, in numbers: shards, chunks and bytes, and whether a node reads nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmscale.corpus.manifest import Manifest
from lmscale.corpus.order import Ints, Order
from lmscale.corpus.schedule import (
    BatchSplit,
    Readers,
    Reads,
    RowRange,
    range_reads,
    row_ranges,
    step_reads,
    stream_readers,
)

__all__ = ["BatchSplit", "ChunkLayout", "NodeShares", "node_shares"]

_MAX_EXACT_CHUNKS = 3 << 19  # enumerated one by one: 0.5 to 1 s per million
_MAX_EXACT_SAMPLES = 1 << 20  # about 1 s per million


@dataclass(frozen=True, slots=True, eq=False)
class ChunkLayout:
    """How chunks are distributed over shards, as far as the manifest says."""

    firsts: Ints  # [shards + 1]: the first chunk of each shard, then the number of chunks
    chunk_bytes: int  # of the tokens of a whole chunk
    last_bytes: int  # of the tokens of the last chunk, which may be shorter

    @classmethod
    def of(cls, manifest: Manifest) -> "ChunkLayout":
        """The layout of a corpus."""
        stored = manifest.tokens + manifest.num_chunks - 1
        width = manifest.chunk_bytes // (manifest.chunk_tokens + 1)
        before = (manifest.num_chunks - 1) * (manifest.chunk_tokens + 1)
        return cls(manifest.first_chunks, manifest.chunk_bytes, max(0, stored - before) * width)

    @property
    def num_chunks(self) -> int:
        """Chunks of the corpus."""
        return int(self.firsts[-1])

    def shards(self, chunks: Ints) -> Ints:
        """The shards that contain these chunks."""
        if self.num_chunks <= _MAX_EXACT_CHUNKS:  # takes a tenth of the time of a search
            return np.repeat(np.arange(len(self.firsts) - 1), np.diff(self.firsts))[chunks]
        return np.searchsorted(self.firsts, chunks, side="right") - 1


@dataclass(frozen=True, slots=True, eq=False)
class NodeShares:
    """What each node reads in `steps` steps from `position` on. Arrays are [nodes], int64."""

    position: int
    steps: int  # covered: at most the requested ones, see node_shares
    samples: Ints
    chunks: Ints  # distinct chunks
    shards: Ints  # distinct shards that contain them
    bytes: Ints  # of the tokens of those chunks, as stored
    shared_chunks: int  # that more than one node reads
    exact: bool  # False: chunks, shards, bytes are expected values, usually within 1 %
    streams_stay: bool  # False: streams change nodes, so most chunks have several readers

    @property
    def largest(self) -> int:
        """The node with the most bytes."""
        return int(np.argmax(self.bytes))

    @property
    def smallest(self) -> int:
        """The node with the fewest bytes."""
        return int(np.argmin(self.bytes))

    @property
    def idle(self) -> Ints:
        """Nodes that read nothing."""
        return np.flatnonzero(self.samples == 0)


def node_shares(
    order: Order, layout: ChunkLayout, split: BatchSplit, *, steps: int, position: int = 0
) -> NodeShares:
    """The share of each node in the steps from `position` on, at most those that end in the same epoch.

        reader = CorpusReader(path, seq_len=..., memory_bytes=0)      # or a Manifest and its two numbers
        order = Order(reader.num_samples, reader.samples_per_chunk, streams, window_chunks=..., seed=...)
        split = BatchSplit(global_batch_size, nodes=..., ranks_per_node=..., tp_size=cfg.parallel.tp)
        shares = node_shares(order, ChunkLayout.of(reader.manifest), split, steps=total_steps)
        shares.shards[shares.largest], shares.bytes.min(), len(shares.idle), shares.shared_chunks

    Later epochs divide the same chunks in another way. The cost is at most a few seconds and 200 MB: above
    1.5 million chunks the numbers are expected values of the same permutations (`exact` is False), and
    where streams change nodes only the first million samples are enumerated (`steps`).
    """
    assert steps >= 1, f"{steps} steps"
    batch, size = split.global_batch_size, order.num_samples
    steps = min(steps, max(1, ((position // size + 1) * size - position) // batch))
    owners = stream_readers(split, order.streams, position=position)
    if owners is None:
        steps = min(steps, max(1, _MAX_EXACT_SAMPLES // batch))
    span = _Span(order, split, position, position + steps * batch)
    exact = owners is None or span.cheap()
    if owners is None:
        counts = _counted(span, _pairs_by_steps(span), layout)
    elif exact:
        counts = _counted(span, _pairs_by_lanes(span, owners), layout)
    else:
        counts = _expected(span, owners, layout)
    first, stop = split.cuts()
    return NodeShares(
        position=position,
        steps=steps,
        samples=(stop - first) * steps,
        chunks=counts.chunks,
        shards=counts.shards,
        bytes=counts.bytes,
        shared_chunks=counts.shared,
        exact=exact,
        streams_stay=owners is not None,
    )


class _Counts(NamedTuple):
    chunks: Ints
    shards: Ints
    bytes: Ints
    shared: int


class _Span(NamedTuple):
    """The positions [position, stop) of a run."""

    order: Order
    split: BatchSplit
    position: int
    stop: int

    def row_ranges(self) -> Iterator[tuple[RowRange, Ints]]:
        """The rows of all lanes, as schedule.row_ranges gives them."""
        streams = np.arange(self.order.streams, dtype=np.int64)
        return row_ranges(self.order, streams, position=self.position, stop=self.stop)

    def cheap(self) -> bool:
        """Whether every chunk can be enumerated."""
        ranges = [(part.stop - part.first, part.whole) for part, _ in self.row_ranges()]
        k, v = self.order.samples_per_chunk, self.order.streams
        chunks = sum(rows // k * v for rows, whole in ranges if whole)
        samples = sum(rows * v for rows, whole in ranges if not whole)
        return chunks <= _MAX_EXACT_CHUNKS and samples <= _MAX_EXACT_SAMPLES


def _pairs_by_steps(span: _Span) -> Iterator[Ints]:
    readers = span.split.readers()
    steps = (span.stop - span.position) // span.split.global_batch_size
    for reads in step_reads(span.order, span.split, position=span.position, steps=steps):
        yield _pairs(readers, reads, span.order)


def _pairs_by_lanes(span: _Span, owners: Readers) -> Iterator[Ints]:
    order = span.order
    for rows, lanes in span.row_ranges():
        shift = rows.epoch * order.num_samples
        for reads in range_reads(order, rows, lanes, position=span.position, stop=span.stop):
            streams = (reads.lanes + shift) % order.streams
            yield _pairs(owners, Reads(streams, reads.chunks), order)


def _pairs(readers: Readers, reads: Reads, order: Order) -> Ints:
    """Node and chunk as one number, for every node that reads the chunk."""
    first = readers.first[reads.lanes]
    several = readers.stop[reads.lanes] - first
    nodes = np.repeat(first, several)
    nodes += np.arange(len(nodes)) - np.repeat(np.cumsum(several) - several, several)
    return nodes * _stored(order) + np.repeat(reads.chunks, several)


def _stored(order: Order) -> int:
    """The number of chunks that contain a sample."""
    return -(-order.num_samples // order.samples_per_chunk)


def _counted(span: _Span, blocks: Iterator[Ints], layout: ChunkLayout) -> _Counts:
    """Exact numbers, from every pair of node and chunk."""
    nodes, num_shards = span.split.nodes, len(layout.firsts) - 1
    node, chunk = np.divmod(_distinct_values(np.concatenate(list(blocks))), _stored(span.order))
    chunks = np.bincount(node, minlength=nodes)
    size = chunks * layout.chunk_bytes
    size[node[chunk == layout.num_chunks - 1]] += layout.last_bytes - layout.chunk_bytes
    shards = _distinct_values(node * num_shards + layout.shards(chunk)) // num_shards
    several = np.sort(chunk)
    shared = len(_distinct_values(several[1:][several[1:] == several[:-1]]))
    return _Counts(chunks, np.bincount(shards, minlength=nodes), size, shared)


def _distinct_values(values: Ints) -> Ints:
    """As np.unique, whose hashing takes five times as long as this sort for millions of numbers."""
    values = np.sort(values)
    return values[np.diff(values, prepend=values[:1] - 1) > 0]


def _expected(span: _Span, owners: Readers, layout: ChunkLayout) -> _Counts:
    """Expected numbers: a permutation spreads a node's samples evenly over groups of equal size."""
    order, nodes = span.order, span.split.nodes
    k, lane_rows = order.samples_per_chunk, order.lane_chunks * order.samples_per_chunk
    lanes = _lanes_of_nodes(owners, nodes)
    tail = order.num_samples - lane_rows * order.streams
    in_lanes, in_tail = 0.0, np.zeros(nodes)  # chunks per lane, chunks per node
    for rows, _ in span.row_ranges():
        if rows.whole:
            in_lanes += (rows.stop - rows.first) // k
            continue
        for chunks, drawn in _parts_of_windows(order, rows.first, min(rows.stop, lane_rows)):
            in_lanes += float(_touched_groups(chunks, k, np.array([drawn]))[0])
        drawn_by = np.minimum((rows.stop - max(rows.first, lane_rows)) * lanes, tail)
        in_tail += _touched_groups(-(-tail // k), k, np.maximum(drawn_by, 0))
    chunks_of_node = np.rint(in_lanes * lanes + in_tail).astype(np.int64)
    shards = np.zeros(nodes)
    for size, count in zip(*np.unique(np.diff(layout.firsts), return_counts=True), strict=True):
        spread = _touched_groups(layout.num_chunks / int(size), int(size), chunks_of_node)
        shards += spread * count * int(size) / layout.num_chunks
    shared = (owners.stop - owners.first > 1).sum() * in_lanes
    if nodes > 1 and in_tail.any():
        shared += -(-tail // k)
    return _Counts(
        chunks_of_node,
        np.rint(shards).astype(np.int64),
        chunks_of_node * layout.chunk_bytes,
        round(shared),
    )


def _lanes_of_nodes(owners: Readers, nodes: int) -> Ints:
    begun = np.bincount(owners.first, minlength=nodes + 1)
    ended = np.bincount(owners.stop, minlength=nodes + 1)
    return np.cumsum(begun - ended)[:nodes]


def _parts_of_windows(order: Order, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Chunks of each window that the rows [first, stop) of a lane touch, and the number of those rows in it."""
    size = order.window_chunks * order.samples_per_chunk
    for begin in range(first // size * size, stop, size):
        chunks = min(order.window_chunks, order.lane_chunks - begin // order.samples_per_chunk)
        yield chunks, min(stop, begin + size) - max(first, begin)


def _touched_groups(groups: float, size: int, drawn: Ints) -> NDArray[np.float64]:
    """The expected number of groups that are touched when `drawn` of groups * size items are drawn."""
    items = groups * size
    each, where = np.unique(drawn, return_inverse=True)
    met = np.empty(len(each))
    for index, number in enumerate(each.tolist()):
        if number > items - size:
            met[index] = groups
            continue
        missed = math.lgamma(items - size + 1) - math.lgamma(items - size - number + 1)
        missed += math.lgamma(items - number + 1) - math.lgamma(items + 1)
        met[index] = groups * -math.expm1(missed)
    return met[where]
