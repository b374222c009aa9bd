import errno
import os
import threading
from pathlib import Path

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.errors import DataError, RetryableError
from lmscale.corpus.order import Order
from lmscale.corpus.reader import CorpusReader, memory_needed
from lmscale.corpus.schedule import Phase, plan_rows
from tests.support.corpora import Made, make

PLENTY, NONE = 1 << 20, 0


def open_reader(made: Made, *, seq_len: int = 16, memory: int = PLENTY) -> CorpusReader:
    return CorpusReader(made.path, seq_len=seq_len, memory_bytes=memory, backoff_s=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("corpus"), tokens=333, chunk_tokens=64, shard_chunks=2)


@pytest.mark.parametrize("memory", [PLENTY, NONE])
@pytest.mark.parametrize("seq_len", [1, 8, 16, 64])
def test_rows_are_windows_of_the_stream(made: Made, seq_len: int, memory: int) -> None:
    with open_reader(made, seq_len=seq_len, memory=memory) as reader:
        assert reader.keeps_chunks == bool(memory)
        assert reader.num_samples == (len(made.stream) - 1) // seq_len
        for sample in range(reader.num_samples):
            tokens, starts = reader.read_sample(sample)
            begin = sample * seq_len
            stop = begin + seq_len
            assert tokens.dtype == starts.dtype == np.int64
            assert tokens.tolist() == made.stream[begin : stop + 1].tolist()
            inside = made.starts[(made.starts > begin) & (made.starts <= stop)]
            assert starts.tolist() == (inside - begin).tolist()


@pytest.mark.parametrize("memory", [PLENTY, NONE])
def test_rows_across_blocks_and_without_document_starts(memory: int, tmp_path: Path) -> None:
    tokens = 150_000  # 600 KB as u32: ten blocks of 64 KiB, the last one short
    made = make(tmp_path, tokens=tokens, chunk_tokens=1 << 17, dtype="u32", documents=False)
    with open_reader(made, seq_len=1 << 12, memory=memory << 10) as reader:
        for sample in range(reader.num_samples):
            got, starts = reader.read_sample(sample)
            assert np.array_equal(got, made.stream[sample << 12 : (sample + 1 << 12) + 1])
            assert not len(starts)


def test_memory_stays_below_its_bound(made: Made) -> None:
    bound = 3 * made.manifest.chunk_bytes + 60
    with CorpusReader(made.path, seq_len=16, memory_bytes=bound, chunks_in_use=2) as reader:
        assert reader.keeps_chunks
        for sample in np.random.default_rng(0).integers(0, reader.num_samples, 200):
            reader.read_sample(int(sample))
            stored = sum(chunk.nbytes for chunk in reader._memory.values())
            assert stored == reader._memory.used <= bound
        assert len(reader._memory.values()) >= 2


def test_reader_holds_chunks_only_where_those_in_use_fit(made: Made) -> None:
    needed = memory_needed(made.manifest, 3)
    for memory, holds in ((needed, True), (needed - 1, False)):
        with CorpusReader(made.path, seq_len=16, memory_bytes=memory, chunks_in_use=3) as reader:
            assert reader.keeps_chunks is holds
    assert memory_needed(made.manifest) == memory_needed(made.manifest, 10**9)


def test_open_files_are_bounded(tmp_path: Path) -> None:
    made = make(tmp_path, tokens=1300, chunk_tokens=16, shard_chunks=1)
    before = len(os.listdir("/proc/self/fd"))
    with open_reader(made, memory=NONE) as reader:
        for sample in range(reader.num_samples):
            reader.read_sample(sample)
        assert len(os.listdir("/proc/self/fd")) - before <= 64
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_may_share_a_reader(made: Made) -> None:
    wrong: list[int] = []
    with CorpusReader(made.path, seq_len=16, memory_bytes=200, chunks_in_use=1) as reader:

        def read(seed: int) -> None:
            for sample in np.random.default_rng(seed).integers(0, reader.num_samples, 100).tolist():
                tokens, _ = reader.read_sample(sample)
                if tokens.tolist() != made.stream[sample * 16 : sample * 16 + 17].tolist():
                    wrong.append(sample)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3))
def test_plan_names_the_bytes_that_are_read(made: Made, batch: int, size: int, tp: int) -> None:
    order = Order(20, 4, streams=batch, window_chunks=2)
    with open_reader(made) as reader:
        assert reader.num_samples == 20
        plan = list(
            plan_rows(
                reader, order, steps=range(2, 5), phases=[Phase(batch)], dp_size=size, tp_size=tp
            )
        )
        assert [row["position"] for row in plan] == list(range(batch, 4 * batch))
        for row in plan:
            raw = Path(row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["bytes"]]
            tokens, _ = reader.read_sample(row["sample"])
            assert crc32c.crc32c(raw) == crc32c.crc32c(tokens.astype(reader.dtype).tobytes())
            assert row["rank"] % tp == 0
            assert row["rank"] // tp < size
            assert row["corpus"] == 0


def test_transient_failures_are_retried_then_told(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, left = os.preadv, [2]

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with open_reader(made) as reader:
        assert reader.read_sample(0)[0].tolist() == made.stream[:17].tolist()
        left[0] = 10**6
        with pytest.raises(RetryableError, match=r"shard-000002\.tar .*Input/output error"):
            reader.read_sample(19)


def test_damage_that_goes_away_is_not_an_error(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    read, wrong = os.preadv, [2]

    def flipping(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        got = read(descriptor, buffers, offset)
        if wrong[0]:
            wrong[0] -= 1
            buffers[0][0] ^= 1
        return got

    monkeypatch.setattr(os, "preadv", flipping)
    with open_reader(made) as reader:
        assert reader.read_sample(5)[0].tolist() == made.stream[80:97].tolist()


def test_shard_of_another_corpus_is_not_read(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    other = make(tmp_path / "b", seed=1)
    os.replace(other.path / "shard-000001.tar", made.path / "shard-000001.tar")
    with open_reader(made) as reader, pytest.raises(DataError, match="index"):
        reader.read_sample(9)
    os.replace(made.path / "shard-000000.tar", made.path / "shard-000001.tar")
    with open_reader(made) as reader, pytest.raises(DataError, match="index"):
        reader.read_sample(9)
