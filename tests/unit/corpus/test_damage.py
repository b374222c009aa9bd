"""Faults put into real files: what a run reads raises, and verify names every one."""

import hashlib
import os
import random
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmscale.base.errors import DataError
from lmscale.corpus.checked_files import CheckedFiles
from lmscale.corpus.integrity import verify
from lmscale.corpus.manifest import tokenizer_path
from lmscale.corpus.reader import CorpusReader
from lmscale.corpus.shard_format import BLOCK_BYTES, Extent, block_crcs
from tests.support.corpora import Made, make, make_collection

SEQ_LEN = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = make(tmp_path_factory.mktemp("damage"), tokens=230, chunk_tokens=64, shard_chunks=3)
    assert read_all(made.path, 0) == read_all(made.path, 1 << 20)
    return made


@pytest.fixture(scope="module")
def needed(made: Made) -> dict[str, list[range]]:
    return bytes_read(made)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.path, tmp_path / "corpus"))


def read_all(path: Path, memory_bytes: int) -> list[tuple[list[int], list[int]]]:
    with CorpusReader(path, seq_len=SEQ_LEN, memory_bytes=memory_bytes, backoff_s=0) as reader:
        tokenizer_path(path, reader.manifest)
        got = (reader.read_sample(sample) for sample in range(reader.num_samples))
        return [(tokens.tolist(), starts.tolist()) for tokens, starts in got]


def bytes_read(made: Made) -> dict[str, list[range]]:
    """The bytes that reading all samples needs, found without the code under test: by tarfile's headers."""
    needed = {
        name: [range((made.path / name).stat().st_size)]
        for name in ("manifest.json", "shards.npy", "tokenizer.json")
    }
    for shard in made.manifest.shards:
        with tarfile.open(made.path / shard.name) as tar:
            needed[shard.name] = [range(m.offset_data, m.offset_data + m.size) for m in tar]
    return needed


def a_bit_of_every_byte(made: Made) -> Iterator[tuple[str, int]]:
    for name in sorted(os.listdir(made.path)):
        for byte in range((made.path / name).stat().st_size):
            yield name, 8 * byte + byte % 8


def check_flip(made: Made, needed: dict[str, list[range]], name: str, bit: int) -> None:
    path = made.path / name
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[bit // 8] ^= 1 << bit % 8
    want = read_all(made.path, 1 << 20)
    path.write_bytes(damaged)
    try:
        problems = verify(made.path)
        assert len(problems) == 1
        assert str(path) in problems[0]
        touched = any(bit // 8 in part for part in needed[name])
        for memory in (0, 1 << 20):
            if touched:
                with pytest.raises(DataError, match=re.escape(str(path))):
                    read_all(made.path, memory)
            else:
                assert read_all(made.path, memory) == want
    finally:
        path.write_bytes(sound)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.sampled_from(range(5)))
@example(0.0, 0, 2)  # first byte of a tar header
@example(0.999999, 7, 2)  # last byte of its padding
def test_any_flipped_bit_is_found(
    made: Made, needed: dict[str, list[range]], where: float, bit: int, file: int
) -> None:
    name = sorted(os.listdir(made.path))[file]
    size = (made.path / name).stat().st_size
    check_flip(made, needed, name, 8 * int(where * size) + bit)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_flipped_bit_in_what_training_reads_raises(
    made: Made, needed: dict[str, list[range]], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(needed)))
    byte = data.draw(
        st.sampled_from([part for part in needed[name] if part]).flatmap(st.sampled_from)
    )
    check_flip(made, needed, name, 8 * byte + data.draw(st.integers(0, 7)))


@pytest.mark.slow
def test_a_flipped_bit_in_every_byte_is_found(made: Made, needed: dict[str, list[range]]) -> None:
    """A sixteenth of the bytes, chosen by a printed seed; all of them with LMSCALE_TEST_WHOLE=1 (make soak)."""
    seed = int(os.environ.get("LMSCALE_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"LMSCALE_TEST_SEED={seed}")
    whole = os.environ.get("LMSCALE_TEST_WHOLE") == "1"
    for index, (name, bit) in enumerate(a_bit_of_every_byte(made)):
        if whole or index % 16 == seed % 16:
            check_flip(made, needed, name, bit)


def test_sound_corpus_has_no_problems_and_reports_progress(made: Made) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(made.path, lambda done, total: seen.append((done, total))) == []
    total = sum(shard.bytes for shard in made.manifest.shards)
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen


@pytest.mark.parametrize("kept", [0, 1, 511, 700, 5000, -512, -1])
def test_truncated_shard(made: Made, copy: Path, kept: int) -> None:
    shard = copy / "shard-000000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:kept])
    problems = verify(copy)
    assert problems[0].startswith(f"{shard} has {len(data[:kept])} bytes, expected {len(data)}")
    if kept >= 0:  # the index lies near the end: without it nothing of the shard is handed out
        with pytest.raises(DataError, match="the file ends at byte"):
            read_all(copy, 0)


def test_shard_with_more_bytes(copy: Path) -> None:
    with (copy / "shard-000001.tar").open("ab") as file:
        file.write(bytes(512))
    (problem,) = verify(copy)
    assert "has 10752 bytes, expected 10240" in problem


@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("fault", ["missing", "folder", "loop"])
def test_shard_that_cannot_be_read(copy: Path, fault: str, memory: int) -> None:
    shard = copy / "shard-000001.tar"
    shard.unlink()
    if fault == "folder":
        shard.mkdir()
    if fault == "loop":
        shard.symlink_to(shard)
    assert any(str(shard) in problem for problem in verify(copy))
    with pytest.raises(DataError, match=rf"{re.escape(str(shard))}.*lmscale verify"):
        read_all(copy, memory)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_shard_without_permission(copy: Path) -> None:
    shard = copy / "shard-000001.tar"
    shard.chmod(0)
    assert any("Permission denied" in problem for problem in verify(copy))
    with pytest.raises(DataError, match="Permission denied"):
        read_all(copy, 0)


def test_message_names_shard_chunk_bytes_reason_and_action(made: Made, copy: Path) -> None:
    shard = copy / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    at = bytes(data).index(made.stream[64:80].astype("<u2").tobytes(), 1024)
    data[at] ^= 4
    shard.write_bytes(data)
    with (
        pytest.raises(DataError) as error,
        CorpusReader(copy, seq_len=SEQ_LEN, memory_bytes=0, backoff_s=0) as reader,
    ):
        reader.read_sample(4)
    text = str(error.value)
    assert re.search(
        rf"{re.escape(str(shard))} chunk 1 \(bytes {at}-{at + 130}\): CRC32C \w{{8}}, expected \w{{8}}",
        text,
    )
    assert f"lmscale verify {copy}" in text
    assert "Restore" in text


def test_missing_or_unknown_files(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "notes.txt").write_text("?")
    (copy / ".nfs0001").touch()
    problems = verify(copy)
    assert len(problems) == 2
    assert any("tokenizer.json" in problem for problem in problems)
    assert any("notes.txt: not part of this corpus" in problem for problem in problems)
    (copy / "manifest.json").unlink()
    (problem,) = verify(copy)
    assert "manifest.json is missing" in problem


def test_verify_of_a_collection_covers_its_parts(tmp_path: Path) -> None:
    out = make_collection(tmp_path / "out")
    assert verify(out) == []
    (out / "stray").mkdir()
    shard = out / "heldout" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    (out / "train" / "manifest.json").write_bytes(b"")
    problems = verify(out)
    assert [any(word in p for p in problems) for word in ("stray", str(shard), "is empty")] == [
        True,
        True,
        True,
    ]
    assert len(problems) == 3


def test_a_part_put_in_the_place_of_another_is_found(tmp_path: Path) -> None:
    out = make_collection(tmp_path / "out")
    shutil.rmtree(out / "train")
    shutil.copytree(out / "heldout", out / "train")
    (problem,) = verify(out)
    assert "its collection covers" in problem
    shutil.rmtree(out / "train")
    (problem,) = verify(out)
    assert "there is no corpus" in problem


def test_damage_beyond_the_first_chunks_is_cut_short(tmp_path: Path) -> None:
    made = make(tmp_path, tokens=2000, chunk_tokens=16, shard_chunks=125)
    shard = tmp_path / "shard-000000.tar"
    entry = made.manifest.shards[0]
    data = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    data[: entry.index_offset - 512] ^= 255
    shard.write_bytes(data.tobytes())
    assert len(verify(tmp_path)) < 12


def test_an_index_of_other_lengths_than_the_manifest_gives_no_sample(tmp_path: Path) -> None:
    """Both sealed: a writer's mistake, which would shift or shorten samples."""
    made = make(tmp_path / "a", tokens=333, chunk_tokens=64, shard_chunks=6)
    short = make(tmp_path / "b", tokens=333 - 7, chunk_tokens=64, shard_chunks=6)
    entry = replace(short.manifest.shards[0], tokens=made.manifest.shards[0].tokens)
    replace(made.manifest, shards=(entry,)).save(short.path)
    with (
        CorpusReader(short.path, seq_len=16, memory_bytes=0, backoff_s=0) as reader,
        pytest.raises(DataError, match="chunk 5 has 6 tokens in the index, 13 in the manifest"),
    ):
        reader.read_sample(0)
    assert any("chunk 5" in problem for problem in verify(short.path))


def test_a_piece_is_never_shorter_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    extent = Extent(0, 100, np.array(block_crcs(bytes(100)), dtype=np.uint32))
    files = CheckedFiles(backoff_s=0)
    assert len(files.blocks(path, "x", extent, block_bytes=BLOCK_BYTES, cut=slice(90, 100))) == 10
    with pytest.raises(DataError, match="only 100 bytes"):
        files.blocks(path, "x", extent, block_bytes=BLOCK_BYTES, cut=slice(90, 101))


@pytest.mark.parametrize(
    "name", ["manifest.json", "shards.npy", "tokenizer.json", "shard-000000.tar"]
)
@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
def test_a_file_that_blocks_or_never_ends_is_a_problem(copy: Path, name: str, kind: str) -> None:
    (copy / name).unlink()
    match kind:
        case "fifo":
            os.mkfifo(copy / name)
        case "zero":
            (copy / name).symlink_to("/dev/zero")
        case "folder":
            (copy / name).mkdir()
    assert any("not a regular file" in problem for problem in verify(copy))
    with pytest.raises(DataError, match="not a regular file"):
        read_all(copy, 0)


def test_a_huge_manifest_is_refused_without_reading_it(copy: Path) -> None:
    os.truncate(copy / "manifest.json", 1 << 40)
    (problem,) = verify(copy)
    assert "at most" in problem


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b"[]", b"\xff"]
)
def test_a_manifest_with_a_good_digest_that_makes_no_sense(copy: Path, text: bytes) -> None:
    covered = text + b"\n"
    digest = hashlib.sha256(covered).hexdigest()
    (copy / "manifest.json").write_bytes(covered + f' "digest": "{digest}"\n}}\n'.encode())
    (problem,) = verify(copy)
    assert "manifest.json" in problem
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_all(copy, 0)
