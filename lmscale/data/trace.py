"""The trace: what each rank really trained on, rebuilt from the Batch, to be held against `lmscale plan --data`."""

from collections.abc import Iterator
from typing import Any

import crc32c
import numpy as np

from lmscale.corpus.order import Order
from lmscale.data.loader import StepBatch
from lmscale.data.objective import record_tokens


def trace_lines(
    step_batch: StepBatch, *, step: int, attempt: int, order: Order, dtype: np.dtype[Any]
) -> Iterator[dict[str, int]]:
    """One line a sample of this rank; fillers are left out.

    crc32c covers the L+1 tokens as the shard stores them (`dtype`), so the line shows that the right
    bytes, not just the right number, reached the model.
    """
    for batch in step_batch.micro_batches:
        real = np.flatnonzero(batch.rows_B >= 0)
        epochs, samples = order.at(batch.rows_B[real])
        for row, epoch, sample in zip(real, epochs, samples, strict=True):
            raw = record_tokens(batch, int(row)).astype(dtype).tobytes()
            yield {
                "step": step,
                "attempt": attempt,
                "position": int(batch.rows_B[row]),
                "corpus": 0,
                "epoch": int(epoch),
                "sample": int(sample),
                "crc32c": crc32c.crc32c(raw),
            }
