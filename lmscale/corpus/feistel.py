"""Keyed bijections on [0, n), many at once: the one source of randomness of the order.

A balanced Feistel network of 6 rounds over a 32-bit integer finaliser, with cycle walking from the next
even power of two; round keys by BLAKE2b-192. Integers only: numpy and torch do not promise that their
random streams stay the same, and this order has to. Any change here is a new version byte.

The network's domain is less than 4 n, so an element walks four steps on average at worst.
"""

import hashlib
import struct
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
    """Round keys [P, ROUNDS] of the bijections named by (seed, tag, corpus, a row of columns [P])."""
    order = np.lexsort(columns)
    rows = np.stack(columns, axis=1)[order]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    raw = b"".join(_key_bytes(seed, tag, corpus, *row) for row in rows[first].tolist())
    distinct = np.frombuffer(raw, dtype="<u4").astype(np.uint32).reshape(-1, ROUNDS)
    keys = np.empty((len(rows), ROUNDS), dtype=np.uint32)
    keys[order] = distinct[np.cumsum(first) - 1]
    return keys


@lru_cache(maxsize=1 << 14)  # a run meets the same windows again in every step, for W*K steps
def _key_bytes(seed: int, tag: Tag, *integers: int) -> bytes:
    name = _VERSION + tag.encode().ljust(8)
    name += struct.pack(f"<{1 + len(integers)}q", seed, *integers)
    return hashlib.blake2b(name, digest_size=4 * ROUNDS).digest()


def permute(x: Ints, *, n: Ints, keys: Keys) -> Ints:
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
    # Halves have at most 31 bits, so the rounds run in uint32, whose products wrap as the finaliser wants.
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
    """Bits of each x >= 0, exactly: a float's logarithm is wrong beside powers of two above 2^53."""
    low, high = x & 0xFFFFFFFF, x >> 32
    _, low_bits = np.frexp(low.astype(np.float64))
    _, high_bits = np.frexp(high.astype(np.float64))
    return np.where(high > 0, high_bits + 32, low_bits).astype(np.int64)
