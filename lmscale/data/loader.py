"""Training batches, one optimizer step at a time, from one integer: the position of its first sample.

The content of a step is a pure function of (position, dp_rank, dp_size), so a checkpoint contains nothing of
the loader; its thread only computes ahead. The trace is what each rank really trained on, rebuilt from the
batch, to be compared with `lmscale plan --data`.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import crc32c
import numpy as np

from lmscale.base.batch import Batch
from lmscale.corpus.order import Order, num_micro_batches, step_positions
from lmscale.corpus.reader import CorpusReader
from lmscale.data.objective import Documents, Ints, Record, causal_batch, record_tokens


@dataclass(frozen=True, slots=True)
class RankShare:
    """The part of every step that this data-parallel rank computes."""

    global_batch_size: int  # samples of one optimizer step over all ranks
    micro_batch_size: int  # rows of one forward on one rank
    dp_rank: int
    dp_size: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All micro-batches of this rank for one optimizer step."""

    position: int  # samples consumed before this step, globally
    micro_batches: list[Batch[np.ndarray]]  # the same number on every rank


class Loader:
    """Reads this rank's samples of each step, a few steps ahead."""

    def __init__(
        self,
        reader: CorpusReader,
        order: Order,
        share: RankShare,
        *,
        documents: Documents,
        prefetch_steps: int = 2,
    ) -> None:
        self._reader = reader
        self._order = order
        self._share = share
        self._documents: Documents = documents
        self._prefetch_steps = prefetch_steps

    def step_batch(self, position: int) -> StepBatch:
        """The step that starts at `position`. Raises DataError where a sample is damaged or missing."""
        share = self._share
        mine = step_positions(
            position,
            global_batch_size=share.global_batch_size,
            streams=self._order.streams,
            dp_rank=share.dp_rank,
            dp_size=share.dp_size,
        )
        _, samples = self._order.samples_at(mine)
        rows = share.micro_batch_size
        batches = []
        for index in range(num_micro_batches(share.global_batch_size, share.dp_size, rows)):
            part = slice(index * rows, (index + 1) * rows)
            batches.append(self._batch(samples[part], mine[part], rows))
        return StepBatch(position, batches)

    def _batch(self, samples: Ints, positions: Ints, rows: int) -> Batch[np.ndarray]:
        return causal_batch(
            [Record(*self._reader.read_sample(int(sample))) for sample in samples],
            rows=rows,
            sample_positions=positions,
            seq_len=self._reader.seq_len,
            documents=self._documents,
        )

    @property
    def seq_len(self) -> int:
        """Targets of one sample."""
        return self._reader.seq_len

    def consumed_batches(self, position: int, *, rows: int = 64) -> Iterator[Batch[np.ndarray]]:
        """The samples of all positions before `position`, in the corpus' own order, which is fast to read."""
        for begin in range(0, position, 65_536):
            block = np.arange(begin, min(begin + 65_536, position), dtype=np.int64)
            _, samples = self._order.samples_at(block)
            samples.sort()
            for part in np.split(samples, range(rows, len(samples), rows)):
                yield self._batch(part, part, rows)

    def steps(self, position: int) -> Generator[StepBatch, None, None]:
        """Steps from `position` on, without end. Close the iterator to end its thread."""
        if self._prefetch_steps == 0:
            while True:
                yield self.step_batch(position)
                position += self._share.global_batch_size
        ahead = _Ahead(self, position, self._share.global_batch_size, self._prefetch_steps)
        try:
            while True:
                yield ahead.take()
        finally:
            ahead.close()


class _Ahead:
    """A thread that computes steps ahead; `take` returns a step or raises the thread's error."""

    def __init__(self, loader: Loader, position: int, stride: int, depth: int) -> None:
        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(loader, position, stride), name="loader", daemon=True
        )
        self._thread.start()

    def _run(self, loader: Loader, position: int, stride: int) -> None:
        while not self._closed.is_set():
            try:
                result: StepBatch | BaseException = loader.step_batch(position)
            except BaseException as error:  # the consumer raises it
                result = error
            while not self._closed.is_set():
                try:
                    self._queue.put(result, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(result, BaseException):
                return
            position += stride

    def take(self) -> StepBatch:
        result = self._queue.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def trace_lines(
    step_batch: StepBatch, *, step: int, attempt: int, order: Order, dtype: np.dtype[Any]
) -> Iterator[dict[str, int]]:
    """One line per sample of this rank, without fillers.

    crc32c covers the L+1 tokens as the shard stores them (`dtype`), so a line shows that the right bytes,
    not only the right sample number, reached the model.
    """
    for batch in step_batch.micro_batches:
        real = np.flatnonzero(batch.rows_B >= 0)
        epochs, samples = order.samples_at(batch.rows_B[real])
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
