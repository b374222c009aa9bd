import math

import numpy as np
import pytest

from lmscale.base.batch import Batch
from lmscale.data.held_out import DISCOUNT, count_ngrams, ngram_nats
from lmscale.data.objective import Record, causal_batch


def batch(tokens: list[int], starts: tuple[int, ...] = ()) -> Batch[np.ndarray]:
    record = Record(np.array(tokens), np.array(starts, np.int64))
    return causal_batch(
        [record],
        rows=2,
        sample_positions=np.array([0]),
        seq_len=len(tokens) - 1,
        documents="separate",
    )


def test_counts_only_targets_that_carry_weight() -> None:
    counts = count_ngrams([batch([1, 2, 1, 2, 3], starts=(3,))], vocab_size=5)
    # the pair (1, 2) before the document's start at 3 is no target; fillers count nothing
    assert dict(zip(counts.pairs.tolist(), counts.times.tolist(), strict=True)) == {
        1 * 5 + 2: 1,
        2 * 5 + 1: 1,
        2 * 5 + 3: 1,
    }
    assert counts.total == 3


def test_scores_equal_the_formula() -> None:
    counts = count_ngrams([batch([0, 1, 0, 1, 0, 2])], vocab_size=4)
    unigram, bigram = ngram_nats(counts, [batch([0, 1, 3])])
    p = [(seen + 1) / (5 + 4) for seen in (2, 2, 1, 0)]  # targets 1 0 1 0 2
    assert unigram == pytest.approx(-math.log(p[1]) - math.log(p[3]))
    after_0 = (2 - DISCOUNT + DISCOUNT * 2 * p[1]) / 3  # 0 -> 1 twice, 0 -> 2 once
    after_1 = (0 + DISCOUNT * 1 * p[3]) / 2  # 1 -> 0 twice
    assert bigram == pytest.approx(-math.log(after_0) - math.log(after_1))


def test_every_distribution_sums_to_one() -> None:
    rng = np.random.default_rng(0)
    size = 7
    counts = count_ngrams([batch(rng.integers(0, size - 1, 200).tolist())], vocab_size=size)
    for context in range(size):
        each = [ngram_nats(counts, [batch([context, token])]) for token in range(size)]
        for model in (0, 1):
            assert sum(math.exp(-pair[model]) for pair in each) == pytest.approx(1)
