"""The order of samples: position -> (epoch, sample), a pure function of a run's constants.

Each sample comes exactly once an epoch, in the same global order for any number of ranks and any batch
size; a run resumes from one integer, in O(1). For a corpus of N samples, K a chunk:

    C = N div K whole chunks, H = C div V chunks a lane (V lanes = streams)
    e, r = divmod(position, N);  lane s = r mod V;  m = r div V
    m < H*K: the lane's m-th sample. Lanes own whole chunks (a chunk is read by one rank an epoch), and
             samples are permuted inside a window of W chunks of the lane
    else:    the tail (chunks that no lane owns, and the ragged rest), permuted as single samples

A corpus smaller than its streams is all tail. Cost: 0.5 to 1 us a position in calls of 10,000,
whatever N.
"""

from dataclasses import dataclass

import numpy as np

from lmscale.corpus.feistel import Ints, permute, round_keys

VERSION = 1  # of this algorithm: identity for ever


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one corpus under one run's constants, all of which are identity."""

    num_samples: int
    samples_per_chunk: int
    streams: int
    window: int = 16  # chunks of a lane that are shuffled together
    seed: int = 0
    corpus: int = 0  # index in the run's list: two corpora of one size have different orders

    def __post_init__(self) -> None:
        sizes = (self.num_samples, self.samples_per_chunk, self.streams, self.window)
        assert min(sizes) >= 1, f"an order of sizes {sizes}"

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """(epochs, samples) of global positions, both int64 [P]. Order and repeats do not matter."""
        u = np.asarray(positions, dtype=np.int64)
        assert not len(u) or u.min() >= 0, f"position {u.min()}"
        epochs, r = np.divmod(u, self.num_samples)
        samples = np.empty_like(r)
        tail_from = self.streams * self.lane_chunks * self.samples_per_chunk
        in_lane = r < tail_from
        samples[in_lane] = self._lane(epochs[in_lane], r[in_lane])
        samples[~in_lane] = self._tail(epochs[~in_lane], r[~in_lane] - tail_from)
        return epochs, samples

    @property
    def lane_chunks(self) -> int:
        """Whole chunks that each lane owns in an epoch."""
        return self._chunks // self.streams

    def chunks_at(self, places: Ints, *, epoch: int) -> Ints:
        """The chunks that an epoch puts at these places: the i-th of lane s is at i * streams + s."""
        return self._shuffled(np.full_like(places, epoch), places)

    @property
    def _chunks(self) -> int:
        return self.num_samples // self.samples_per_chunk

    def _lane(self, epochs: Ints, r: Ints) -> Ints:
        k, lane_samples = self.samples_per_chunk, self.lane_chunks * self.samples_per_chunk
        m, lane = np.divmod(r, self.streams)
        w, o = np.divmod(m, self.window * k)
        o = permute(
            o,
            n=np.minimum(self.window * k, lane_samples - w * self.window * k),
            keys=round_keys(self.seed, "window", self.corpus, epochs, lane, w),
        )
        chunk = (w * self.window + o // k) * self.streams + lane
        return self._shuffled(epochs, chunk) * k + o % k

    def _tail(self, epochs: Ints, j: Ints) -> Ints:
        k, owned = self.samples_per_chunk, self.streams * self.lane_chunks
        j = permute(
            j,
            n=np.full_like(j, self.num_samples - owned * k),
            keys=round_keys(self.seed, "tail", self.corpus, epochs),
        )
        whole = (self._chunks - owned) * k
        samples = self._chunks * k + j - whole  # the ragged rest; whole chunks are put right next
        inside = j < whole
        chunk = owned + j[inside] // k
        samples[inside] = self._shuffled(epochs[inside], chunk) * k + j[inside] % k
        return samples

    def _shuffled(self, epochs: Ints, chunks: Ints) -> Ints:
        keys = round_keys(self.seed, "chunk", self.corpus, epochs)
        return permute(chunks, n=np.full_like(chunks, self._chunks), keys=keys)
