import os
import subprocess
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lmscale.base.errors import RetryableError
from lmscale.corpus.shard_format import (
    BLOCK_BYTES,
    Chunk,
    IndexEntry,
    block_crcs,
    chunk_range,
    dtype_for,
    num_chunks,
    pack_index,
    parse_index,
    stored_crc32c,
    write_shard,
)
from tests.support.corpora import make


def test_tar_reads_what_was_written(tmp_path: Path) -> None:
    made = make(tmp_path, tokens=333, chunk_tokens=64, shard_chunks=2)
    subprocess.run(["tar", "-xf", "shard-000001.tar"], cwd=tmp_path, check=True)
    tokens = np.fromfile(tmp_path / "00000002.u16", dtype="<u2")
    assert tokens.tolist() == made.stream[128:193].tolist()
    starts = np.fromfile(tmp_path / "00000002.docs.u32", dtype="<u4") + 128
    assert starts.tolist() == [s for s in made.starts.tolist() if 128 <= s < 193]
    with tarfile.open(tmp_path / "shard-000001.tar") as tar:
        assert tar.getnames()[-1] == "__lmidx__"
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}


def test_webdataset_reads_the_chunks(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    made = make(tmp_path, tokens=333, chunk_tokens=64, shard_chunks=2)
    stages = webdataset.tariterators
    with (tmp_path / "shard-000000.tar").open("rb") as file:
        source = [{"url": "shard", "stream": file}]
        samples = list(stages.group_by_keys(stages.tar_file_expander(source)))
    assert [sample["__key__"] for sample in samples] == ["00000000", "00000001"]
    assert np.frombuffer(samples[1]["u16"], "<u2").tolist() == made.stream[64:129].tolist()


def test_neighbouring_chunks_share_one_token() -> None:
    ranges = [chunk_range(n, tokens=333, chunk_tokens=64) for n in range(num_chunks(333, 64))]
    assert ranges[0] == (0, 65)
    assert all(left[1] == right[0] + 1 for left, right in pairwise(ranges))
    assert ranges[-1][1] == 333
    assert [num_chunks(tokens, 64) for tokens in (0, 1, 2, 65, 66)] == [0, 0, 1, 1, 2]


def test_equal_chunks_make_equal_bytes_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 2e9)
    make(tmp_path / "b")
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_index_round_trips_with_several_blocks() -> None:
    tokens, starts = bytes(range(256)) * 1000, b"\1\0\0\0"
    rows = [IndexEntry(512, 128_000, 256_512, 1), IndexEntry(300_000, 128_000, 0, 0)]
    crcs = [*block_crcs(tokens), *block_crcs(starts), *block_crcs(tokens)]
    data = pack_index(rows, crcs, first_chunk=17, token_bytes=2)
    index = parse_index(data, index_crc32c=stored_crc32c(data))
    assert index.block_bytes == BLOCK_BYTES
    assert index.tokens(17).crcs.tolist() == crcs[:4]
    listed = index.starts(17)
    assert listed is not None
    assert (listed.offset, listed.bytes, listed.crcs.tolist()) == (256_512, 4, crcs[4:5])
    assert index.tokens(18).offset == 300_000
    assert index.tokens(18).crcs.tolist() == crcs[5:]
    assert index.starts(18) is None


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[Chunk]:
        yield Chunk(np.array([1, 2]), None)
        raise OSError(28, "No space left on device")

    with pytest.raises(RetryableError, match="No space left"):
        write_shard(tmp_path / "shard-000000.tar", chunks(), first_chunk=0, dtype="u16")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(np.array([1, 70_000]), None),
        Chunk(np.array([-1, 2]), None),
        Chunk(np.array([1]), None),
        Chunk(np.array([1, 2, 3]), np.array([1, 1])),
        Chunk(np.array([1, 2, 3]), np.array([3])),
    ],
)
def test_writer_refuses_what_cannot_be_right(chunk: Chunk, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_shard(tmp_path / "shard-000000.tar", [chunk], first_chunk=0, dtype="u16")
    assert not os.listdir(tmp_path)


def test_dtype_holds_every_id() -> None:
    assert [dtype_for(size) for size in (300, 65_536, 65_537)] == ["u16", "u16", "u32"]
