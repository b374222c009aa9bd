"""Dropout whose mask may be a function of where an element stands, not of when a generator was asked.

Shapes: B rows, l tokens of a row that this rank holds (all L without sequence parallelism), D model width.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Word = TypeVar("Word", int, Tensor)  # 0 <= word < 2**32; int64 where it is a tensor


# Two words of each token [B, l] and one of each channel [D]. Tensors, because torch.compile makes constants of
# numbers, and then a graph for each of them.
Words = tuple[Tensor, Tensor, Tensor]


# A finaliser of 32 bits (github.com/skeeto/hash-prospector, bias 0.107). Both multipliers are below 2**31, so
# a product of int64 never overflows, which C++ leaves undefined and compilers exploit.
_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97


_WORD = 0xFFFFFFFF


# Fractional bits of square roots, so that equal numbers hash differently in different roles.
_LANES = (0x6A09E667, 0xBB67AE85)  # 2 and 3


_CHANNEL = 0x3C6EF372  # 5


class Dropout:
    """Drops elements of hidden states with probability `rate` and scales the rest by 1 / (1 - rate).

    Made once per forward. Plain: F.dropout, from torch's generators. Exact: an element's fate is a hash of
    (torch.initial_seed(), global position of its row, site, token, channel), in integers, so every way to cut a
    batch into ranks, micro-batches and parts of a row drops the same elements, on every device. rate 0: identity.
    """

    def __init__(self, rate: float, words: Words | None = None):
        self.rate = rate
        self.words = words

    @classmethod
    def of(
        cls, x_BlD: Tensor, rate: float, *, rows_B: Tensor | None = None, token_part: int = 0
    ) -> "Dropout":
        """For hidden states like x_BlD, at site 0; exact under torch.use_deterministic_algorithms.

        rows_B: global positions of the rows; None: 0, 1, ... token_part: which l tokens of a row these are.
        """
        if not rate or not torch.are_deterministic_algorithms_enabled():
            return cls(rate)
        rows, length, width = x_BlD.shape
        device, seed = x_BlD.device, torch.initial_seed()
        rows_B = torch.arange(rows, device=device) if rows_B is None else rows_B.to(device)
        tokens_l = token_part * length + torch.arange(length, device=device)
        a_Bl, b_Bl = (
            _mixed(_absorb(_absorb(lane, seed), rows_B)[:, None] ^ tokens_l) for lane in _LANES
        )
        channels_D = _mixed(torch.arange(width, device=device) ^ _CHANNEL)
        return cls(rate, (a_Bl, b_Bl, channels_D))

    @property
    def exact(self) -> bool:
        """Whether the mask is a function of its place."""
        return self.words is not None

    def at(self, site: int) -> "Dropout":
        """The same for another place in the model, from 1 up: other elements are dropped there."""
        if self.words is None:
            return self
        a_Bl, b_Bl, channels_D = self.words
        a_site, b_site = (_mixed(_mixed(lane) ^ site) for lane in _LANES)
        return Dropout(self.rate, (a_Bl ^ a_site, b_Bl ^ b_site, channels_D))

    def __call__(self, x_BlD: Tensor) -> Tensor:
        """Elements dropped, the rest scaled."""
        if not self.rate:
            return x_BlD
        if self.words is None:
            return F.dropout(x_BlD, self.rate)
        dropped_BlD = _hashed(self.words) < round(self.rate * 2**32)
        return x_BlD.masked_fill(dropped_BlD, 0) * (1 / (1 - self.rate))


def _hashed(words: Words) -> Tensor:
    """[B, l, D] words: _mixed of token and channel, in place, because an element has 8 bytes here."""
    a_Bl, b_Bl, channels_D = words
    hash_BlD = a_Bl[..., None] ^ channels_D
    hash_BlD ^= hash_BlD >> 16
    hash_BlD *= _FIRST
    hash_BlD &= _WORD
    hash_BlD ^= hash_BlD >> 15
    # The second word enters half-way: with 32 bits a token, many tokens of a batch would share their mask.
    hash_BlD ^= b_Bl[..., None]
    hash_BlD *= _SECOND
    hash_BlD &= _WORD
    return (
        hash_BlD  # _mixed's last shift changes low bits only, which hardly matter in a comparison
    )


def _absorb(state: int, number: Word) -> Word:
    """A state that depends on all 64 bits of the number."""
    low = _mixed((number & _WORD) ^ state)
    return _mixed(((number >> 32) & _WORD) ^ low)


def _mixed(word: Word) -> Word:
    word = ((word ^ (word >> 16)) * _FIRST) & _WORD
    word = ((word ^ (word >> 15)) * _SECOND) & _WORD
    return word ^ (word >> 15)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums, angles and losses of values stored as `dtype`."""
    return torch.promote_types(dtype, torch.float32)
