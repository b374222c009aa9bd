"""How long the shard plan takes: the shares of all nodes, and the list of one node, without a corpus on disk.

    python tools/bench_shard_plan.py [--shards 1000000] [--nodes 2048] [--rounds 5] [--manifest | --corpus OUT]

`shares` is what `lmscale plan` asks for; `list` what a node asks for before it stages; `memory` the most that
this process has held so far. A corpus of a million shards of one chunk each is looked up chunk by chunk; above
1.5 million chunks the shares are expected values. `load` is reading and checking a manifest, and `plan` the
shares from what it says: of a manifest made for this (--manifest), or of a corpus folder (--corpus). Medians;
`cpu` is what they cost this process, which a busy machine changes less.
"""

import argparse
import hashlib
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmscale.corpus.manifest import Manifest, TokenizerEntry, load_part
from lmscale.corpus.order import Order
from lmscale.corpus.schedule import BatchSplit, chunks_ahead
from lmscale.corpus.shard_format import ShardEntry, shard_name
from lmscale.corpus.shares import ChunkLayout, NodeShares, node_shares

_CHUNK_TOKENS, _SEQ_LEN, _RANKS = 1 << 18, 4096, 8


def median_s(
    work: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    seconds = []
    for _ in range(rounds):
        begun = clock()
        work()
        seconds.append(clock() - begun)
    return statistics.median(seconds)


def bench(shards: int, chunks_each: int, nodes: int, rounds: int, position: int) -> None:
    k, chunks = _CHUNK_TOKENS // _SEQ_LEN, shards * chunks_each
    batch = nodes * _RANKS
    order = Order(chunks * k, k, batch)
    layout = ChunkLayout(np.arange(shards + 1, dtype=np.int64) * chunks_each, 524_290, 524_290)
    split, steps = BatchSplit(batch, nodes, _RANKS), chunks * k // batch

    def listed() -> int:
        blocks = chunks_ahead(order, split, node=nodes // 2, position=position, steps=steps)
        return sum(len(block) for block in blocks)

    found = node_shares(order, layout, split, position=position, steps=steps)
    shares_s = median_s(
        lambda: node_shares(order, layout, split, position=position, steps=steps), rounds
    )
    list_s = median_s(listed, rounds)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{shards:>9,} shards x {chunks_each:>3} chunks, {nodes:,} nodes, from {position:>6,}: "
        f"shares {shares_s:.2f} s ({'exact' if found.exact else 'expected'}), list of one node "
        f"{list_s:.3f} s ({listed():,} chunks), memory {memory:.0f} MB"
    )


def bench_corpus(folder: Path, nodes: int, rounds: int) -> None:
    def load() -> Manifest:
        return load_part(folder)[1]

    def plan() -> NodeShares:
        k, batch = manifest.chunk_tokens // seq_len, nodes * _RANKS
        samples = manifest.num_samples(seq_len)
        order, split = Order(samples, k, batch), BatchSplit(batch, nodes, _RANKS)
        return node_shares(order, ChunkLayout.of(manifest), split, steps=max(1, samples // batch))

    manifest = load()
    seq_len = math.gcd(manifest.chunk_tokens, _SEQ_LEN)
    found = plan()
    for name, work in (("load", load), ("plan", plan)):
        wall, cpu = (
            median_s(work, rounds, clock) for clock in (time.perf_counter, time.process_time)
        )
        print(
            f"{len(manifest.shards):>9,} shards, {nodes:,} nodes: {name} {wall:.2f} s, cpu {cpu:.2f} s"
        )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"          shares are {'exact' if found.exact else 'expected'}, memory {memory:.0f} MB")


def write_manifest(folder: Path, shards: int) -> None:
    """That of a corpus of one chunk a shard; there are no shards."""
    entries = [
        ShardEntry(
            shard_name(number),
            525_312,
            hashlib.sha256(shard_name(number).encode()).hexdigest(),
            524_800,
            200,
            number * 2_654_435_761 % (1 << 32),
            1,
            _CHUNK_TOKENS + 1,
        )
        for number in range(shards)
    ]
    tokenizer = TokenizerEntry("tokenizer.json", "0" * 64, "0" * 64, 256, {"bos": 0})
    tokens = shards * _CHUNK_TOKENS + 1
    Manifest("u16", _CHUNK_TOKENS, tokens, shards, tokens, tokenizer, entries).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--nodes", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--manifest", action="store_true")
    parser.add_argument("--corpus", type=Path)
    args = parser.parse_args()
    if args.corpus:
        bench_corpus(args.corpus, args.nodes, args.rounds)
        return
    if args.manifest:
        with tempfile.TemporaryDirectory() as folder:
            # By another process: what writing takes shall not count as this one's memory.
            writer = multiprocessing.get_context("spawn").Process(
                target=write_manifest, args=(Path(folder), args.shards)
            )
            writer.start()
            writer.join()
            bench_corpus(Path(folder), args.nodes, args.rounds)
        return
    for chunks_each in (1, 2, 16, 256):
        for position in (0, 100_000):
            bench(args.shards, chunks_each, args.nodes, args.rounds, position)


if __name__ == "__main__":
    main()
