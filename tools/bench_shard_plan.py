"""How long the shard plan takes: the shares of all nodes, and the list of one node, without a corpus on disk.

    python tools/bench_shard_plan.py [--shards 1000000] [--nodes 2048] [--rounds 5]

`shares` is what `lmscale plan` asks for; `list` what a node asks for before it stages; `memory` the most that
this process has held so far. A corpus of a million shards of one chunk each is looked up chunk by chunk; above
1.5 million chunks the shares are expected values. Reading a manifest is not counted: --manifest times it.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmscale.corpus.ahead import Split, chunks_ahead
from lmscale.corpus.manifest import Manifest, TokenizerEntry
from lmscale.corpus.order import Order
from lmscale.corpus.shard import ShardEntry, shard_name
from lmscale.corpus.shares import Layout, node_shares

_CHUNK_TOKENS, _SEQ_LEN, _RANKS = 1 << 18, 4096, 8


def median_s(work: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def bench(shards: int, chunks_each: int, nodes: int, rounds: int, position: int) -> None:
    k, chunks = _CHUNK_TOKENS // _SEQ_LEN, shards * chunks_each
    batch = nodes * _RANKS
    order = Order(chunks * k, k, batch)
    layout = Layout(np.arange(shards + 1, dtype=np.int64) * chunks_each, 524_290, 524_290)
    split, steps = Split(batch, nodes, _RANKS), chunks * k // batch

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


def bench_manifest(shards: int) -> None:
    entries = tuple(
        ShardEntry(
            shard_name(number), 525_312, "0" * 64, 524_800, 200, number, 1, _CHUNK_TOKENS + 1
        )
        for number in range(shards)
    )
    tokenizer = TokenizerEntry("tokenizer.json", "0" * 64, "0" * 64, 256, {"bos": 0})
    tokens = shards * _CHUNK_TOKENS + 1
    manifest = Manifest("u16", _CHUNK_TOKENS, tokens, shards, tokens, tokenizer, entries)
    with tempfile.TemporaryDirectory() as folder:
        manifest.save(Path(folder))
        begun = time.perf_counter()
        Manifest.load(Path(folder))
        loaded = time.perf_counter() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{shards:>9,} shards: the manifest is read in {loaded:.1f} s, memory {memory:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--nodes", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--manifest", action="store_true")
    args = parser.parse_args()
    for chunks_each in (1, 2, 16, 256):
        for position in (0, 100_000):
            bench(args.shards, chunks_each, args.nodes, args.rounds, position)
    if args.manifest:
        bench_manifest(args.shards)


if __name__ == "__main__":
    main()
