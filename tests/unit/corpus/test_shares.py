"""Which node reads what, held against the functions that the ranks use, sample by sample."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmscale.corpus import shares as shares_module
from lmscale.corpus.order import Order, step_positions
from lmscale.corpus.schedule import BatchSplit, chunks_ahead, stream_readers
from lmscale.corpus.shares import ChunkLayout, node_shares
from tests.support.corpora import make

small = st.integers(1, 6)


@st.composite
def splits(draw: st.DrawFn) -> BatchSplit:
    nodes, ranks, tp = draw(small), draw(small), draw(st.sampled_from((1, 1, 2, 3)))
    assume(nodes * ranks % tp == 0)
    return BatchSplit(draw(st.integers(1, 24)), nodes, ranks, tp)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    return Order(
        draw(st.integers(1, 400)),
        draw(small),
        draw(st.integers(1, 24)),
        draw(small),
        seed=draw(small),
    )


def layout_of(order: Order, *, shard_chunks: int = 3) -> ChunkLayout:
    chunks = -(-order.num_samples // order.samples_per_chunk)
    firsts = np.append(np.arange(0, chunks, shard_chunks), chunks)
    return ChunkLayout(firsts, 1000, 10)


def really_read(
    order: Order, split: BatchSplit, *, position: int, steps: int
) -> dict[int, dict[int, int]]:
    """node -> chunk -> the step that reads it first, as the ranks find their samples."""
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for step in range(steps):
        for rank in range(split.nodes * split.ranks_per_node):
            mine = step_positions(
                position + step * split.global_batch_size, global_batch_size=split.global_batch_size,
                streams=order.streams, dp_rank=rank // split.tp_size, dp_size=split.dp_size,
            )  # fmt: skip
            for chunk in (order.samples_at(mine)[1] // order.samples_per_chunk).tolist():
                found[rank // split.ranks_per_node].setdefault(chunk, step)
    return found


@settings(max_examples=150, deadline=None)
@given(orders(), splits(), st.integers(0, 900), st.integers(1, 40))
def test_a_node_plans_exactly_the_chunks_that_its_ranks_read(
    order: Order, split: BatchSplit, position: int, steps: int
) -> None:
    want = really_read(order, split, position=position, steps=steps)
    for node in range(split.nodes):
        blocks = list(chunks_ahead(order, split, node=node, position=position, steps=steps))
        for block in blocks:
            assert len(set(block.tolist())) == len(block)
        assert set(np.concatenate([[], *blocks]).tolist()) == set(want[node])


@settings(max_examples=80, deadline=None)
@given(orders(), splits(), st.integers(0, 300))
def test_the_nodes_of_an_epoch_read_every_chunk(
    order: Order, split: BatchSplit, position: int
) -> None:
    steps = -(-order.num_samples // split.global_batch_size)
    read = [
        chunk
        for node in range(split.nodes)
        for block in chunks_ahead(order, split, node=node, position=0, steps=steps)
        for chunk in block.tolist()
    ]
    assert set(read) == set(range(-(-order.num_samples // order.samples_per_chunk)))


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(1, 4), st.integers(0, 3))
def test_chunks_come_in_order_of_first_use_up_to_a_window(
    order: Order, nodes: int, turns: int
) -> None:
    split = BatchSplit(order.streams, nodes, 1)
    assume(order.streams >= nodes)
    position, steps = turns * order.streams, -(-order.num_samples // order.streams)
    window_steps = order.window_chunks * order.samples_per_chunk
    want = really_read(order, split, position=position, steps=steps)
    for node in range(nodes):
        blocks = chunks_ahead(order, split, node=node, position=position, steps=steps)
        firsts = [want[node][c] for c in dict.fromkeys(c for b in blocks for c in b.tolist())]
        latest = np.maximum.accumulate(firsts)
        assert (firsts > latest - 2 * window_steps).all()  # two: lanes shift by a row at most


@settings(max_examples=150, deadline=None)
@given(orders(), splits(), st.integers(0, 900), st.integers(1, 40))
def test_shares_count_what_is_really_read(
    order: Order, split: BatchSplit, position: int, steps: int
) -> None:
    layout = layout_of(order)
    got = node_shares(order, layout, split, position=position, steps=steps)
    left = order.num_samples - position % order.num_samples
    assert got.steps == min(steps, max(1, left // split.global_batch_size))
    assert got.exact
    want = really_read(order, split, position=position, steps=got.steps)
    chunks = [sorted(want[node]) for node in range(split.nodes)]
    assert got.chunks.tolist() == [len(some) for some in chunks]
    last = layout.num_chunks - 1
    assert got.bytes.tolist() == [sum(10 if c == last else 1000 for c in some) for some in chunks]
    assert got.shards.tolist() == [len({c // 3 for c in some}) for some in chunks]
    readers = np.bincount([c for some in chunks for c in some])
    assert got.shared_chunks == (readers > 1).sum()
    assert got.idle.tolist() == [node for node, some in enumerate(chunks) if not some]
    assert got.bytes[got.largest] == got.bytes.max()
    assert got.bytes[got.smallest] == got.bytes.min()


@pytest.mark.parametrize(
    ("batch", "streams", "nodes", "ranks", "stay"),
    [
        (16, 16, 4, 2, True),
        (16, 16, 3, 1, True),  # unequal shares, but each stream has one node
        (32, 16, 4, 2, True),
        (16, 32, 4, 2, True),  # two steps meet all streams
        (16, 4, 8, 1, False),  # fewer streams than nodes
        (15, 16, 4, 1, False),
    ],
)
def test_when_streams_stay_with_a_node(
    batch: int, streams: int, nodes: int, ranks: int, stay: bool
) -> None:
    split = BatchSplit(batch, nodes, ranks)
    assert (stream_readers(split, streams, position=0) is not None) == stay
    order = Order(4000, 8, streams)
    got = node_shares(order, layout_of(order), split, steps=10**6)
    assert got.streams_stay == stay
    if stay:  # only chunks of the tail have several readers
        tail = order.num_samples - order.lane_chunks * 8 * streams
        assert got.shared_chunks <= -(-tail // 8)
    else:
        assert got.shared_chunks > got.chunks.sum() / 10


@pytest.mark.parametrize("position", [0, 1000, 31_337])
@pytest.mark.parametrize("steps", [37, 500, 10**6])
def test_expected_numbers_are_close_to_the_exact_ones(
    position: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, split = Order(320_777, 16, 64, seed=3), BatchSplit(64, 4, 2)
    layout = layout_of(order, shard_chunks=5)
    exact = node_shares(order, layout, split, position=position, steps=steps)
    monkeypatch.setattr(shares_module, "_MAX_EXACT_CHUNKS", 0)
    monkeypatch.setattr(shares_module, "_MAX_EXACT_SAMPLES", 0)
    expected = node_shares(order, layout, split, position=position, steps=steps)
    assert exact.exact
    assert not expected.exact
    assert (exact.samples == expected.samples).all()
    for name in ("chunks", "shards", "bytes"):
        want, got = getattr(exact, name), getattr(expected, name)
        assert np.allclose(got, want, rtol=0.05, atol=3), (name, got, want)  # 3 sigma of the draws
    assert abs(expected.shared_chunks - exact.shared_chunks) <= 2 + 0.05 * exact.shared_chunks


def test_streams_that_wander_are_counted_for_the_first_steps_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shares_module, "_MAX_EXACT_SAMPLES", 150)
    order = Order(4000, 8, 16)
    got = node_shares(order, layout_of(order), BatchSplit(15, 4, 1), steps=100)
    assert (got.steps, got.exact, got.samples.sum()) == (10, True, 150)


def test_the_layout_of_a_corpus(tmp_path: object) -> None:
    from pathlib import Path

    made = make(Path(str(tmp_path)), tokens=333, chunk_tokens=64, shard_chunks=2)
    layout = ChunkLayout.of(made.manifest)
    sizes = [
        (entry.tokens * 2, layout.chunk_bytes * entry.chunks) for entry in made.manifest.shards
    ]
    *whole, last = sizes
    assert all(stored == planned for stored, planned in whole)
    assert last[0] == last[1] - layout.chunk_bytes + layout.last_bytes
    chunks = np.arange(made.manifest.num_chunks)
    assert layout.shards(chunks).tolist() == [0, 0, 1, 1, 2, 2]
