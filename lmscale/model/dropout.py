"""Dropout whose mask can be a function of the position of each element, independent of the parallel layout.

Shapes: B rows, l tokens of a row that this rank has (all L without sequence parallelism), D hidden size.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Word = TypeVar("Word", int, Tensor)  # 0 <= word < 2**32; int64 where it is a tensor
# Two hashes of each token [B, l] and one of each channel [D]. Tensors, because torch.compile makes constants of
# numbers, and then compiles one graph for each of them.
HashKeys = tuple[Tensor, Tensor, Tensor]

# A finaliser of 32 bits (github.com/skeeto/hash-prospector, bias 0.107). Both multipliers are below 2**31, so
# a product of int64 never overflows, which C++ leaves undefined and compilers exploit.
_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97
_MASK_32 = 0xFFFFFFFF
# Fractional bits of the square roots of 2, 3 and 5, so that equal numbers hash differently in different roles.
_ROOTS = (0x6A09E667, 0xBB67AE85)
_CHANNEL_ROOT = 0x3C6EF372


class Dropout:
    """Drops elements of hidden states with probability `rate` and scales the rest by 1 / (1 - rate).

    Created once per forward. Plain: F.dropout, from torch's generators. Exact: whether an element is dropped is a
    hash of (torch.initial_seed(), global position of its row, site, token, channel), in integers, so every split
    of a batch into ranks, micro-batches and parts of a row drops the same elements, on every device. rate 0:
    identity.
    """

    def __init__(self, rate: float, keys: HashKeys | None = None):
        self.rate = rate
        self.keys = keys

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
            _mix(_absorb(_absorb(root, seed), rows_B)[:, None] ^ tokens_l) for root in _ROOTS
        )
        channels_D = _mix(torch.arange(width, device=device) ^ _CHANNEL_ROOT)
        return cls(rate, (a_Bl, b_Bl, channels_D))

    @property
    def exact(self) -> bool:
        """Whether the mask is a function of the position of each element."""
        return self.keys is not None

    def at_site(self, site: int) -> "Dropout":
        """The dropout of another place in the model, numbered from 1: other elements are dropped there."""
        if self.keys is None:
            return self
        a_Bl, b_Bl, channels_D = self.keys
        a_site, b_site = (_mix(_mix(root) ^ site) for root in _ROOTS)
        return Dropout(self.rate, (a_Bl ^ a_site, b_Bl ^ b_site, channels_D))

    def __call__(self, x_BlD: Tensor) -> Tensor:
        """Elements dropped, the rest scaled."""
        if not self.rate:
            return x_BlD
        if self.keys is None:
            return F.dropout(x_BlD, self.rate)
        dropped_BlD = _hashed(self.keys) < round(self.rate * 2**32)
        return x_BlD.masked_fill(dropped_BlD, 0) * (1 / (1 - self.rate))


def _hashed(keys: HashKeys) -> Tensor:
    """[B, l, D] hashes: _mix of token and channel, in place, because an element has 8 bytes here."""
    a_Bl, b_Bl, channels_D = keys
    hash_BlD = a_Bl[..., None] ^ channels_D
    hash_BlD ^= hash_BlD >> 16
    hash_BlD *= _FIRST
    hash_BlD &= _MASK_32
    hash_BlD ^= hash_BlD >> 15
    # The second key enters half-way: with 32 bits per token, many tokens of a batch would share their mask.
    hash_BlD ^= b_Bl[..., None]
    hash_BlD *= _SECOND
    hash_BlD &= _MASK_32
    # The last shift of _mix is left out: it changes low bits only, which hardly matter in a comparison.
    return hash_BlD


def _absorb(state: int, number: Word) -> Word:
    """A state that depends on all 64 bits of the number."""
    low = _mix((number & _MASK_32) ^ state)
    return _mix(((number >> 32) & _MASK_32) ^ low)


def _mix(word: Word) -> Word:
    """A permutation of the numbers of 32 bits in which every input bit changes about half of the output bits."""
    word = ((word ^ (word >> 16)) * _FIRST) & _MASK_32
    word = ((word ^ (word >> 15)) * _SECOND) & _MASK_32
    return word ^ (word >> 15)
