"""Validation: every held-out sample exactly once, on any number of ranks, in sums.

Bits per byte = nats of the scored targets / (ln 2 * UTF-8 bytes those targets stand for), which compares
models with different vocabularies; special tokens cost bits and stand for no byte. Where a foreign
tokenizer puts a space before each text, that space counts as a byte: at most one per document.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lmscale.base.batch import Batch
from lmscale.corpus.reader import CorpusReader
from lmscale.data import held_out as baselines
from lmscale.data.held_out import held_out_batches
from lmscale.data.loader import Loader
from lmscale.data.objective import Documents
from lmscale.distributed.process_group import sum_over, to_device
from lmscale.engine.base import Engine
from lmscale.train.run_context import RunContext

# Counting is exact up to here and then uses the first tokens, of the run and of each held-out corpus: 16M take
# seconds and 0.5 GB, and the other ranks are waiting.
_COUNTED_TOKENS = 16_000_000

Line = dict[str, Any]


class Validation:
    """Scores an engine, and counted baselines, on the held-out corpora of a run."""

    def __init__(
        self,
        corpora: Mapping[str, CorpusReader],
        *,
        token_bytes: list[int],
        documents: Documents,
        micro_batch: int,
        max_samples: int | None,
    ) -> None:
        self._corpora = corpora
        self._token_bytes = np.asarray(token_bytes, np.int64)
        self._documents: Documents = documents
        self._micro_batch = micro_batch
        self._max_samples = max_samples

    def score(self, engine: Engine, rank: RunContext, *, step: int) -> list[Line]:
        """The lines of eval.jsonl for this step. Collective: every rank calls it; all get the same lines."""
        lines = []
        for path, reader in self._corpora.items():
            sums = torch.zeros(2, dtype=torch.float64, device=rank.device)
            text_bytes = 0
            for batch in self._batches(reader, rank.mesh.dp_rank, rank.mesh.dp_size):
                found = engine.evaluate(to_device(batch, rank.device))
                rank.progress.tick("eval")
                sums += torch.stack([found.loss.double(), found.weight.double()])
                text_bytes += self._bytes(batch)
            total = torch.cat([sums, sums.new_tensor([text_bytes])])
            nats, targets, all_bytes = sum_over(total, rank.mesh.dp_group).tolist()
            lines += _lines(step, path, nats, targets, all_bytes)
        return lines

    def count_baselines(
        self, loader: Loader, *, position: int, vocab_size: int, step: int
    ) -> list[Line]:
        """Unigram and bigram bits per byte, counted on the samples before `position`. One process, no collective.

        loader: one that reads whole steps (dp_size 1).
        """
        most = max(1, _COUNTED_TOKENS // loader.seq_len)
        counted = min(position, most)
        counts = baselines.count_ngrams(loader.consumed_batches(counted), vocab_size)
        lines = []
        for path, reader in self._corpora.items():
            text_bytes = sum(self._bytes(batch) for batch in self._batches(reader, most=most))
            pair = baselines.ngram_nats(counts, self._batches(reader, most=most))
            for name, nats in zip(("unigram", "bigram"), pair, strict=True):
                value = bits_per_byte(nats, text_bytes)
                lines.append(_line(step, path, f"bits_per_byte_{name}", value, counts.total))
        return lines

    def _batches(
        self, reader: CorpusReader, dp_rank: int = 0, dp_size: int = 1, *, most: int | None = None
    ) -> Iterator[Batch[np.ndarray]]:
        limits = [limit for limit in (self._max_samples, most) if limit is not None]
        return held_out_batches(
            reader,
            documents=self._documents,
            micro_batch_size=self._micro_batch,
            dp_rank=dp_rank,
            dp_size=dp_size,
            max_samples=min(limits, default=None),
        )

    def _bytes(self, batch: Batch[np.ndarray]) -> int:
        return int(self._token_bytes[batch.targets_BL[batch.weights_BL > 0]].sum())


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits that the scored targets cost, per byte of text that they stand for."""
    return nats / (math.log(2) * max(text_bytes, 1))


def _lines(step: int, path: str, nats: float, targets: float, text_bytes: float) -> list[Line]:
    loss = nats / targets if targets else math.nan
    count = int(targets)
    return [
        _line(step, path, "loss", loss, count),
        _line(step, path, "bits_per_byte", bits_per_byte(nats, text_bytes), count),
    ]


def _line(step: int, path: str, metric: str, value: float, count: int) -> Line:
    return {"step": step, "corpus": path, "metric": metric, "value": value, "count": count}
