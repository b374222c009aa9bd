"""The order written once more, straight from its formulas, one position at a time in Python's integers.

u = position ; e, r = divmod(u, N) ; s = r mod V ; m = r div V ; C = N div K ; H = C div V
m < H*K:  w, o = divmod(m, W*K) ; o' = F(o; window, c, e, s, w) on min(W*K, H*K - w*W*K)
          sample = F^C((w*W + o' div K)*V + s; chunk, c, e)*K + o' mod K
else:     j = F(r - V*H*K; tail, c, e) on N - V*H*K: first the chunks no lane owns, then the ragged rest
"""

import hashlib
from dataclasses import dataclass

WORD = (1 << 32) - 1


def keys(seed: int, tag: str, *numbers: int) -> list[int]:
    name = b"\x01" + f"{tag:<8}".encode("ascii")
    for number in (seed, *numbers):
        name += number.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(name, digest_size=24).digest()
    return [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 24, 4)]


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


def bijection(x: int, n: int, round_keys: list[int]) -> int:
    half = 1
    while 1 << 2 * half < n:
        half += 1
    low = (1 << half) - 1
    while True:
        left, right = x >> half, x & low
        for key in round_keys:
            left, right = right, left ^ mix(right + key & WORD) & low
        x = left << half | right
        if x < n:
            return x


@dataclass(frozen=True)
class Reference:
    n: int
    k: int
    v: int
    w: int
    seed: int
    c: int = 0

    def samples_at(self, position: int) -> tuple[int, int]:
        n, k, v, window, seed, c = self.n, self.k, self.v, self.w, self.seed, self.c
        e, r = divmod(position, n)
        chunks = n // k
        lane_chunks = chunks // v
        chunk_keys = keys(seed, "chunk", c, e)
        m, s = divmod(r, v)
        if m < lane_chunks * k:
            w, o = divmod(m, window * k)
            size = min(window * k, lane_chunks * k - w * window * k)
            o = bijection(o, size, keys(seed, "window", c, e, s, w))
            chunk = bijection((w * window + o // k) * v + s, chunks, chunk_keys)
            return e, chunk * k + o % k
        owned = v * lane_chunks
        j = bijection(r - owned * k, n - owned * k, keys(seed, "tail", c, e))
        if j < (chunks - owned) * k:
            return e, bijection(owned + j // k, chunks, chunk_keys) * k + j % k
        return e, chunks * k + j - (chunks - owned) * k
