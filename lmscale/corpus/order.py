"""The order of samples: position -> (epoch, sample), and position -> rank. Pure functions of a run's constants.

Each sample comes exactly once per epoch, in the same global order for any number of ranks and any batch
size, and a run resumes from one integer in O(1). For a corpus of N samples with K per chunk, and V streams:

    C = N div K whole chunks, H = C div V chunks per lane
    e, r = divmod(position, N);  lane s = r mod V;  m = r div V
    m < H*K: the lane's m-th sample. Lanes own whole chunks (a chunk is read by one rank per epoch), and
             samples are permuted inside a window of W chunks of the lane
    else:    the tail (chunks that no lane owns, and the rest of the last one), permuted sample by sample

A *stream* is the set of positions with equal position mod V; a *lane* is the same of the offset r within
an epoch. They are equal in epoch 0; afterwards a lane is a stream shifted by the epoch's first position.
A corpus smaller than its streams is all tail. Cost: 0.5 to 1 us per position in calls of 10,000, for any N.

The only source of randomness is a keyed bijection on [0, n): a balanced Feistel network of 6 rounds over a
32-bit integer finaliser, with cycle walking from the next even power of two; round keys by BLAKE2b-192.
It uses integers only: numpy and torch do not promise that their random streams stay the same, and this
order must. Any change here needs a new version byte. The network's domain is less than 4 n, so an element
takes four steps on average at worst.

A step's batch is the positions [p, p + B). Sorted by (stream, position), rank r of R computes the sorted
indices i with i*R div B == r. Shares differ by at most one for any R. With B = V a stream, and so each
chunk of an epoch, stays with one rank; that is locality only: the batch is the same set for any R.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Keys = NDArray[np.uint32]  # [P, ROUNDS]
Tag = Literal["mix", "window", "chunk", "tail"]

ROUNDS = 6
_VERSION = b"\x01"


def round_keys(seed: int, tag: Tag, corpus: int, *columns: Ints) -> Keys:
    """Round keys [P, ROUNDS] of the bijections that (seed, tag, corpus, one row of the columns [P]) name."""
    order = np.lexsort(columns)
    rows = np.stack(columns, axis=1)[order]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    raw = b"".join(_key_bytes(seed, tag, corpus, *row) for row in rows[first].tolist())
    distinct = np.frombuffer(raw, dtype="<u4").astype(np.uint32).reshape(-1, ROUNDS)
    keys = np.empty((len(rows), ROUNDS), dtype=np.uint32)
    keys[order] = distinct[np.cumsum(first) - 1]
    return keys


@lru_cache(maxsize=1 << 14)  # a run uses the same windows in every step, for W*K steps
def _key_bytes(seed: int, tag: Tag, *integers: int) -> bytes:
    name = _VERSION + tag.encode().ljust(8)
    name += struct.pack(f"<{1 + len(integers)}q", seed, *integers)
    return hashlib.blake2b(name, digest_size=4 * ROUNDS).digest()


def feistel_permutation(x: Ints, *, n: Ints, keys: Keys) -> Ints:
    """F^n(x; keys) element by element: x and n are [P], keys is [P, ROUNDS]; 0 <= x < n < 2^62."""
    bits = _bit_length(n - 1)
    half = ((np.maximum(bits, 2) + 1) // 2).astype(np.uint64)
    y = x.astype(np.uint64)
    limit = n.astype(np.uint64)
    walking = np.arange(len(x))
    while len(walking):
        y[walking] = _network(y[walking], half[walking], keys[walking])
        walking = walking[y[walking] >= limit[walking]]
    return y.astype(np.int64)


def _network(x: NDArray[np.uint64], half: NDArray[np.uint64], keys: Keys) -> NDArray[np.uint64]:
    # Halves have at most 31 bits, so the rounds use uint32, whose products wrap as the finaliser requires.
    mask = ((np.uint64(1) << half) - np.uint64(1)).astype(np.uint32)
    left, right = (x >> half).astype(np.uint32), x.astype(np.uint32) & mask
    for key in keys.T:
        left, right = right, left ^ (_finalise(right, key) & mask)
    return (left.astype(np.uint64) << half) | right


def _finalise(x: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A 32-bit mixer (constants: Ettinger and Wellons' lowbias32)."""
    x = x + key
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _bit_length(x: Ints) -> Ints:
    """Bits of each x >= 0, exactly: a float's logarithm is wrong next to powers of two above 2^53."""
    low, high = x & 0xFFFFFFFF, x >> 32
    _, low_bits = np.frexp(low.astype(np.float64))
    _, high_bits = np.frexp(high.astype(np.float64))
    return np.where(high > 0, high_bits + 32, low_bits).astype(np.int64)


VERSION = 1  # of this algorithm; part of a run's identity, so it never changes for an order


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one corpus under one run's constants, all of which belong to the run's identity."""

    num_samples: int
    samples_per_chunk: int
    streams: int
    window_chunks: int = 16  # chunks of a lane that are shuffled together
    seed: int = 0
    corpus: int = 0  # index in the run's list: two corpora of one size have different orders

    def __post_init__(self) -> None:
        sizes = (self.num_samples, self.samples_per_chunk, self.streams, self.window_chunks)
        assert min(sizes) >= 1, f"an order of sizes {sizes}"

    def samples_at(self, positions: Ints) -> tuple[Ints, Ints]:
        """(epochs, samples) of global positions, both int64 [P]. Order and repeats do not matter."""
        u = np.asarray(positions, dtype=np.int64)
        assert not len(u) or u.min() >= 0, f"position {u.min()}"
        epochs, r = np.divmod(u, self.num_samples)
        samples = np.empty_like(r)
        tail_from = self.streams * self.lane_chunks * self.samples_per_chunk
        in_lane = r < tail_from
        samples[in_lane] = self._lane(epochs[in_lane], r[in_lane])
        samples[~in_lane] = self._tail(epochs[~in_lane], r[~in_lane] - tail_from)
        return epochs, samples

    @property
    def lane_chunks(self) -> int:
        """Whole chunks that each lane owns in an epoch."""
        return self._chunks // self.streams

    def chunks_at(self, slots: Ints, *, epoch: int) -> Ints:
        """The chunks in these slots of an epoch: the i-th chunk of lane s is in slot i * streams + s."""
        return self._shuffled(np.full_like(slots, epoch), slots)

    @property
    def _chunks(self) -> int:
        return self.num_samples // self.samples_per_chunk

    def _lane(self, epochs: Ints, r: Ints) -> Ints:
        k, lane_samples = self.samples_per_chunk, self.lane_chunks * self.samples_per_chunk
        m, lane = np.divmod(r, self.streams)
        w, o = np.divmod(m, self.window_chunks * k)
        o = feistel_permutation(
            o,
            n=np.minimum(self.window_chunks * k, lane_samples - w * self.window_chunks * k),
            keys=round_keys(self.seed, "window", self.corpus, epochs, lane, w),
        )
        chunk = (w * self.window_chunks + o // k) * self.streams + lane
        return self._shuffled(epochs, chunk) * k + o % k

    def _tail(self, epochs: Ints, j: Ints) -> Ints:
        k, owned = self.samples_per_chunk, self.streams * self.lane_chunks
        j = feistel_permutation(
            j,
            n=np.full_like(j, self.num_samples - owned * k),
            keys=round_keys(self.seed, "tail", self.corpus, epochs),
        )
        whole = (self._chunks - owned) * k
        samples = self._chunks * k + j - whole  # the rest of the last chunk; whole chunks follow
        inside = j < whole
        chunk = owned + j[inside] // k
        samples[inside] = self._shuffled(epochs[inside], chunk) * k + j[inside] % k
        return samples

    def _shuffled(self, epochs: Ints, chunks: Ints) -> Ints:
        keys = round_keys(self.seed, "chunk", self.corpus, epochs)
        return feistel_permutation(chunks, n=np.full_like(chunks, self._chunks), keys=keys)


def step_positions(
    position: int, *, global_batch_size: int, streams: int, dp_rank: int, dp_size: int
) -> Ints:
    """The positions that `dp_rank` computes in the step that starts at `position`, by (stream, position)."""
    assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
    batch = np.arange(position, position + global_batch_size, dtype=np.int64)
    by_stream = batch[np.argsort(batch % streams, kind="stable")]
    first, stop = (-(-global_batch_size * rank // dp_size) for rank in (dp_rank, dp_rank + 1))
    return by_stream[first:stop]


def num_micro_batches(global_batch_size: int, dp_size: int, micro_batch_size: int) -> int:
    """Micro-batches of a step, the same on every rank so that collectives match; some rows may be fillers."""
    largest_share = -(-global_batch_size // dp_size)
    return -(-largest_share // micro_batch_size)


def wasted_frac(global_batch_size: int, dp_size: int, micro_batch_size: int) -> float:
    """Share of the computed rows that are fillers."""
    computed = (
        num_micro_batches(global_batch_size, dp_size, micro_batch_size) * micro_batch_size * dp_size
    )
    return 1 - global_batch_size / computed


def chunks_in_use(*, streams: int, dp_size: int, window_chunks: int) -> int:
    """Chunks that a rank reads from at a time: the shuffle windows of its streams (the largest share)."""
    return -(-streams // dp_size) * window_chunks
