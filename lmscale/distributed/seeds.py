"""Randomness as a pure function of counters, so that no generator state has to be saved."""

import hashlib

import torch


def mix(*parts: int | str) -> int:
    """A well-spread number in [0, 2**63) of integers and names, the same on every machine.

    BLAKE2b of an unambiguous encoding, because Python's own hash is salted per process and sums of
    counters collide. A few microseconds: not for use per token.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        kind = "s" if isinstance(part, str) else "i"
        text = str(part).encode()
        digest.update(f"{kind}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def seed_step(seed: int, step: int, dp_rank: int, tp_rank: int) -> None:
    """Reseed torch on the CPU and every CUDA device for one optimizer step of this rank.

    A resumed step draws what it would have drawn. Ranks that must draw alike pass the same dp_rank and tp_rank.
    """
    torch.manual_seed(mix("step", seed, step, dp_rank, tp_rank))
