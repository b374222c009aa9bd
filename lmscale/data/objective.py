"""Objectives turn records into a Batch, on the CPU, as pure functions. Causal language modelling so far.

Shapes: B rows, L tokens per row; a record is L+1 tokens, so that each input has its target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lmscale.base.batch import Batch, Stream

Documents = Literal["separate", "joined"]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Record:
    """One sample of a stream corpus."""

    tokens: Ints  # L+1 tokens
    starts: Ints  # offsets in 1..L at which another document starts


def causal_batch(
    records: Sequence[Record],
    *,
    rows: int,
    sample_positions: Ints,
    seq_len: int,
    documents: Documents,
) -> Batch[np.ndarray]:
    """The next token is the target; `rows - len(records)` filler rows without targets follow the records.

    sample_positions: the global position of each record.
    documents: "separate" restarts token offsets at each document, gives each document an id (attention
    stays inside equal ids) and drops the target that would predict another document's first token.
    "joined" treats a row as one text (documents_BL is None: attention uses its plain causal kernel).
    """
    tokens_BL1 = np.zeros((rows, seq_len + 1), np.int64)
    starts_BL1 = np.zeros((rows, seq_len + 1), bool)
    for row, record in enumerate(records):
        assert record.tokens.shape == (seq_len + 1,), (
            "a shorter record would be broadcast over the row"
        )
        tokens_BL1[row] = record.tokens
        starts_BL1[row, record.starts] = True
    filled = len(records)
    weights_BL = np.zeros((rows, seq_len), np.float32)
    weights_BL[:filled] = 1
    offsets_BL = np.broadcast_to(np.arange(seq_len), (rows, seq_len))
    documents_BL: Ints | None = None
    if documents == "separate":
        is_start_BL = starts_BL1[:, :-1]
        documents_BL = np.cumsum(is_start_BL, axis=1, dtype=np.int64)
        documents_BL[filled:] = -1
        weights_BL[starts_BL1[:, 1:]] = 0
        offsets_BL = offsets_BL - np.maximum.accumulate(
            np.where(is_start_BL, offsets_BL, 0), axis=1
        )
    rows_B = np.full(rows, -1, np.int64)
    rows_B[:filled] = sample_positions
    return Batch(
        inputs=Stream(
            tokens_BL1[:, :-1].copy(), np.ascontiguousarray(offsets_BL, np.int64), documents_BL
        ),
        source=None,
        targets_BL=tokens_BL1[:, 1:].copy(),
        weights_BL=weights_BL,
        rows_B=rows_B,
    )


def record_tokens(batch: Batch[np.ndarray], row: int) -> Ints:
    """The L+1 tokens that a row of a causal batch was made from."""
    return np.append(batch.inputs.tokens_BL[row], batch.targets_BL[row, -1])
