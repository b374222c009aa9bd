"""Held-out batches, each sample once for any number of ranks, and the n-gram models that score them.

A language model that is not better than a bigram model has learned little. Unigram and bigram counts of the
tokens that a run was trained on are scored on the same targets as validation, so the numbers compare.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmscale.base.batch import Batch
from lmscale.corpus.reader import CorpusReader
from lmscale.data.objective import Documents, Record, causal_batch


def held_out_batches(
    reader: CorpusReader,
    *,
    documents: Documents,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_samples: int | None = None,
) -> Iterator[Batch[np.ndarray]]:
    """This rank's contiguous share of the first `max_samples` samples (None: all).

    Every rank yields the same number of batches, the last ones with filler rows, so that collectives
    match. A rest shorter than seq_len belongs to no sample, as in training.
    """
    total = reader.num_samples if max_samples is None else min(max_samples, reader.num_samples)
    first, last = (-(-total * rank // dp_size) for rank in (dp_rank, dp_rank + 1))
    largest = -(-total // dp_size)
    for index in range(-(-largest // micro_batch_size)):
        begin = min(first + index * micro_batch_size, last)
        mine = np.arange(begin, min(begin + micro_batch_size, last), dtype=np.int64)
        yield causal_batch(
            [Record(*reader.read_sample(int(sample))) for sample in mine],
            rows=micro_batch_size,
            sample_positions=mine,
            seq_len=reader.seq_len,
            documents=documents,
        )


# Absolute discounting, interpolated with the unigram model (Ney, Essen & Kneser 1994, "On structuring
# probabilistic dependences in stochastic language modelling"); 0.75 is the customary discount.
DISCOUNT = 0.75

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NgramCounts:
    """Counted (context, target) pairs, sorted by pair code = context * vocab_size + target."""

    vocab_size: int
    pairs: Ints  # distinct codes, ascending
    times: Ints  # how often each occurs

    @property
    def total(self) -> int:
        """Targets counted."""
        return int(self.times.sum())


def count_ngrams(batches: Iterable[Batch[np.ndarray]], vocab_size: int) -> NgramCounts:
    """Count every target with a weight above 0, with the token before it."""
    codes = [
        (batch.inputs.tokens_BL * vocab_size + batch.targets_BL)[batch.weights_BL > 0]
        for batch in batches
    ]
    pairs, times = np.unique(np.concatenate(codes), return_counts=True)
    return NgramCounts(vocab_size, pairs, times)


def ngram_nats(counts: NgramCounts, batches: Iterable[Batch[np.ndarray]]) -> tuple[float, float]:
    """Negative log likelihood of the weighted targets, summed: (unigram, bigram).

    Unigram: add-one. Bigram: P(w|h) = max(c(hw) - d, 0)/c(h) + d*T(h)/c(h) * P(w), T(h) = distinct
    followers of h; a context without a count uses the unigram.
    """
    size = counts.vocab_size
    contexts, targets = np.divmod(counts.pairs, size)
    target_counts = np.bincount(targets, weights=counts.times, minlength=size)
    unigram = (target_counts + 1) / (target_counts.sum() + size)
    context_total = np.bincount(contexts, weights=counts.times, minlength=size)
    followers = np.bincount(contexts, minlength=size)
    unigram_nats = bigram_nats = 0.0
    for batch in batches:
        has_target = batch.weights_BL > 0
        context, target = batch.inputs.tokens_BL[has_target], batch.targets_BL[has_target]
        code = context * size + target
        index = np.minimum(np.searchsorted(counts.pairs, code), len(counts.pairs) - 1)
        times = np.where(counts.pairs[index] == code, counts.times[index], 0)
        base = unigram[target]
        total = np.maximum(context_total[context], 1)
        smooth = (np.maximum(times - DISCOUNT, 0) + DISCOUNT * followers[context] * base) / total
        unigram_nats -= float(np.log(base).sum())
        bigram_nats -= float(np.log(np.where(context_total[context] > 0, smooth, base)).sum())
    return unigram_nats, bigram_nats
