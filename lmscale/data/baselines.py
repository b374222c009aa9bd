"""What counting alone achieves: unigram and bigram models of the tokens a run was trained on.

A language model that does not beat a bigram has learned little; both are scored on the very targets
that validation scores, so the numbers compare.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmscale.batch import Batch

# Absolute discounting, interpolated with the unigram model (Ney, Essen & Kneser 1994, "On structuring
# probabilistic dependences in stochastic language modelling"); 0.75 is the customary discount.
DISCOUNT = 0.75

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """Counted (context, target) pairs, sorted by pair code = context * vocab_size + target."""

    vocab_size: int
    pairs: Ints  # distinct codes, ascending
    times: Ints  # how often each was seen

    @property
    def total(self) -> int:
        """Targets counted."""
        return int(self.times.sum())


def count(batches: Iterable[Batch[np.ndarray]], vocab_size: int) -> Counts:
    """Count every target that carries weight, with the token before it."""
    codes = [
        (batch.inputs.tokens_BL * vocab_size + batch.targets_BL)[batch.weights_BL > 0]
        for batch in batches
    ]
    pairs, times = np.unique(np.concatenate(codes), return_counts=True)
    return Counts(vocab_size, pairs, times)


def nats(counts: Counts, batches: Iterable[Batch[np.ndarray]]) -> tuple[float, float]:
    """Negative log likelihood of the weighted targets, summed: (unigram, bigram).

    Unigram: add-one. Bigram: P(w|h) = max(c(hw) - d, 0)/c(h) + d*T(h)/c(h) * P(w), T(h) = distinct
    followers of h; an unseen context falls back to the unigram.
    """
    size = counts.vocab_size
    contexts, targets = np.divmod(counts.pairs, size)
    seen = np.bincount(targets, weights=counts.times, minlength=size)
    unigram = (seen + 1) / (seen.sum() + size)
    context_total = np.bincount(contexts, weights=counts.times, minlength=size)
    followers = np.bincount(contexts, minlength=size)
    unigram_nats = bigram_nats = 0.0
    for batch in batches:
        real = batch.weights_BL > 0
        context, target = batch.inputs.tokens_BL[real], batch.targets_BL[real]
        code = context * size + target
        at = np.minimum(np.searchsorted(counts.pairs, code), len(counts.pairs) - 1)
        times = np.where(counts.pairs[at] == code, counts.times[at], 0)
        base = unigram[target]
        total = np.maximum(context_total[context], 1)
        smooth = (np.maximum(times - DISCOUNT, 0) + DISCOUNT * followers[context] * base) / total
        unigram_nats -= float(np.log(base).sum())
        bigram_nats -= float(np.log(np.where(context_total[context] > 0, smooth, base)).sum())
    return unigram_nats, bigram_nats
