"""Copies of chunks: the same samples whatever happens to them, and a cache that keeps within its room."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lmscale.base.errors import ConfigError, DataError
from lmscale.corpus import staging
from lmscale.corpus.node_cache import cache_lock, chunk_path, corpus_cache_folder
from lmscale.corpus.order import Ints
from lmscale.corpus.reader import CorpusReader
from lmscale.corpus.staging import Stager, StagingResult
from tests.support.corpora import Made, make

SEQ_LEN = 16
CHUNKS = 10
Samples = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = make(tmp_path_factory.mktemp("corpus"), tokens=630, chunk_tokens=64, shard_chunks=3)
    assert made.manifest.num_chunks == CHUNKS
    return made


@pytest.fixture(scope="module")
def samples(made: Made) -> Samples:
    return read_all(made.path)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.path, tmp_path / "corpus"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read_all(path: Path, cache: Path | None = None, *, memory_bytes: int = 1 << 20) -> Samples:
    with CorpusReader(
        path, seq_len=SEQ_LEN, memory_bytes=memory_bytes, backoff_s=0, cache_dir=cache
    ) as reader:
        got = (reader.read_sample(sample) for sample in range(reader.num_samples))
        return [(tokens.tolist(), starts.tolist()) for tokens, starts in got]


def stage(
    made: Made, cache: Path, *chunks: int, cache_bytes: int | None = None, path: Path | None = None
) -> StagingResult:
    """Stage these chunks (default: all) in that order."""
    blocks: list[Ints] = [np.array(chunks or range(CHUNKS), dtype=np.int64)]
    stop = threading.Event()
    with cache_lock(cache, stop, say=print) as mine:
        assert mine
        stager = Stager(path or made.path, made.manifest, cache, cache_bytes=cache_bytes)
        return stager.stage(blocks, max_chunks=CHUNKS, stop=stop, progress=lambda done, total: None)


def cached(made: Made, cache: Path) -> set[int]:
    folder = corpus_cache_folder(cache, made.manifest)
    names = [path.name for path in folder.iterdir()]
    assert all(name.endswith(".chunk") for name in names), names
    return {int(name.removesuffix(".chunk")) for name in names}


def without_tokens(corpus: Path) -> Path:
    """The corpus as it is when its file system is gone: only the manifest, which readers have read."""
    for shard in corpus.glob("*.tar"):
        shard.unlink()
    return corpus


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20], ids=["row by row", "held"])
@pytest.mark.parametrize("documents", [True, False])
def test_a_whole_cache_needs_nothing_of_the_corpus(
    memory_bytes: int, documents: bool, tmp_path: Path
) -> None:
    made = make(tmp_path / "corpus", tokens=630, documents=documents)
    want = read_all(made.path)
    done = stage(made, tmp_path / "cache")
    assert (done.copied, done.wanted, done.present, done.all_fit) == (CHUNKS, CHUNKS, 0, True)
    without_tokens(made.path)
    assert read_all(made.path, tmp_path / "cache", memory_bytes=memory_bytes) == want
    with pytest.raises(DataError):
        read_all(made.path, memory_bytes=memory_bytes)


def test_chunks_of_several_blocks_and_u32(tmp_path: Path) -> None:
    made = make(tmp_path / "corpus", tokens=150_000, chunk_tokens=65_536, dtype="u32")
    want = read_all(made.path)
    stop = threading.Event()
    stager = Stager(made.path, made.manifest, tmp_path / "cache", cache_bytes=None)
    stager.stage([np.arange(3)], max_chunks=3, stop=stop, progress=lambda done, total: None)
    assert read_all(without_tokens(made.path), tmp_path / "cache", memory_bytes=0) == want


def test_a_cache_that_holds_some_chunks_changes_nothing(
    made: Made, samples: Samples, cache: Path
) -> None:
    stage(made, cache, 7, 1, 4)
    assert cached(made, cache) == {1, 4, 7}
    for memory_bytes in (0, 1 << 20):
        assert read_all(made.path, cache, memory_bytes=memory_bytes) == samples


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 9)


def of_another_chunk(path: Path) -> None:
    shutil.copy(path.with_name("00000002.chunk"), path)


def of_another_corpus(path: Path) -> None:
    folder = path.parent.parent.parent / "another"
    other = make(folder / "corpus", tokens=630, chunk_tokens=64, shard_chunks=3, seed=5)
    stage(other, folder / "cache")
    shutil.copy(corpus_cache_folder(folder / "cache", other.manifest) / path.name, path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20], ids=["row by row", "held"])
@pytest.mark.parametrize(
    "fault", [cut, emptied, lengthened, of_another_chunk, of_another_corpus, a_folder]
)
def test_a_wrong_copy_is_never_read(
    fault: Callable[[Path], None], memory_bytes: int, made: Made, samples: Samples, cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    stage(made, cache)
    path = chunk_path(corpus_cache_folder(cache, made.manifest), 4)
    fault(path)
    with caplog.at_level(logging.WARNING, logger="lmscale"):
        assert read_all(made.path, cache, memory_bytes=memory_bytes) == samples
    assert not path.is_file()
    assert str(path) in caplog.records[0].getMessage()
    if fault is not a_folder:
        stage(made, cache)
        assert cached(made, cache) == set(range(CHUNKS))


def test_a_flip_in_any_byte_of_a_copy_is_seen_and_said_once(
    made: Made, samples: Samples, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage(made, cache)
    path = chunk_path(corpus_cache_folder(cache, made.manifest), 4)
    sound = path.read_bytes()
    first, stop = 4 * 4, 5 * 4  # the samples of this chunk
    for at in range(len(sound)):
        flipped = bytearray(sound)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        caplog.clear()
        with CorpusReader(made.path, seq_len=SEQ_LEN, memory_bytes=0, cache_dir=cache) as reader:
            got = [reader.read_sample(sample) for sample in range(first, stop)]
        assert [(t.tolist(), s.tolist()) for t, s in got] == samples[first:stop], f"byte {at}"
        assert not path.exists(), f"byte {at}"
        assert len(caplog.records) == 1, f"byte {at}"


def test_several_damaged_copies_are_said_once(
    made: Made, samples: Samples, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage(made, cache)
    for path in corpus_cache_folder(cache, made.manifest).iterdir():
        cut(path)
    assert read_all(made.path, cache) == samples
    assert len(caplog.records) == 1
    assert cached(made, cache) == set()


def test_a_copy_that_vanishes_while_it_is_in_use(
    made: Made, samples: Samples, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage(made, cache)
    with CorpusReader(made.path, seq_len=SEQ_LEN, memory_bytes=0, cache_dir=cache) as reader:
        reader.read_sample(16)
        reader.close()  # of the open file: else it would still be readable
        shutil.rmtree(cache)
        got = [reader.read_sample(sample) for sample in range(reader.num_samples)]
    assert [(t.tolist(), s.tolist()) for t, s in got] == samples
    assert len(caplog.records) == 1
    assert "gone" in caplog.records[0].getMessage()


def test_damage_of_the_corpus_is_not_copied(made: Made, copy: Path, cache: Path) -> None:
    shard = copy / made.manifest.shards[1].name
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        stage(made, cache, path=copy)
    assert not cached(made, cache) & {3}


def bytes_of(made: Made, cache: Path, *chunks: int) -> int:
    folder = corpus_cache_folder(cache, made.manifest)
    return sum(chunk_path(folder, chunk).stat().st_size for chunk in chunks)


def test_what_is_read_first_gets_the_room_and_old_copies_go_first(
    made: Made, cache: Path, tmp_path: Path
) -> None:
    stage(made, tmp_path / "all")
    room = bytes_of(made, tmp_path / "all", 5, 9, 2, 7) + 100  # half a chunk
    stage(made, cache, 8, 9)
    done = stage(made, cache, 5, 9, 2, 7, 1, 6, cache_bytes=room)
    assert cached(made, cache) == {5, 9, 2, 7}
    assert (done.wanted, done.present, done.copied, done.evicted) == (4, 1, 3, 1)
    assert not done.all_fit
    room = bytes_of(made, tmp_path / "all", 5, 2) + 20
    done = stage(made, cache, 5, 2, cache_bytes=room)  # less than is used
    assert cached(made, cache) == {5, 2}
    assert (done.copied, done.evicted, done.all_fit) == (0, 2, True)


def test_other_corpora_in_the_folder_count_and_stay(
    made: Made, cache: Path, tmp_path: Path
) -> None:
    other = make(tmp_path / "other", tokens=630, seed=9)
    stage(other, cache)
    used = sum(path.stat().st_size for path in corpus_cache_folder(cache, other.manifest).iterdir())
    done = stage(made, cache, cache_bytes=used + 10)
    assert (done.wanted, done.copied, done.all_fit) == (0, 0, False)
    assert cached(other, cache) == set(range(CHUNKS))


def test_a_full_disk_takes_what_fits(made: Made, samples: Samples, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a full disk needs root: mount -t tmpfs")
    cache = tmp_path / "disk"
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "lmscale-test", str(cache)]
    if subprocess.run(mount, check=False, capture_output=True, timeout=20).returncode:
        pytest.skip("a full disk needs the right to mount a tmpfs")
    try:
        (cache / "of somebody else").write_bytes(b"x" * 9000)
        real_room = staging.free_cache_bytes
        with pytest.MonkeyPatch.context() as patch:  # the disk fills up after the look at its room
            patch.setattr(
                staging,
                "free_cache_bytes",
                lambda *_, **__: real_room(cache, cache_bytes=None) + 10**6,
            )
            done = stage(made, cache)
        assert done.stopped_by == "its disk is full"
        assert 0 < done.copied < CHUNKS
        assert len(cached(made, cache)) == done.copied
        assert read_all(made.path, cache) == samples
        for path in corpus_cache_folder(cache, made.manifest).iterdir():
            path.unlink()
        assert 0 < stage(made, cache).copied < CHUNKS  # by the margin, before the disk refuses
    finally:
        subprocess.run(["umount", str(cache)], check=True, timeout=20)


def test_a_folder_that_cannot_be_made_is_an_error_of_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"data\.cache_dir"),
        cache_lock(tmp_path / "file" / "cache", threading.Event(), say=print),
    ):
        pass


CODE = """
import sys, threading, time
from pathlib import Path
import numpy as np
from lmscale.corpus.manifest import Manifest
from lmscale.corpus.node_cache import cache_lock
from lmscale.corpus.staging import Stager
corpus, cache = map(Path, sys.argv[1:3])
manifest, stop = Manifest.load(corpus), threading.Event()
with cache_lock(cache, stop, say=lambda text: print("waiting", flush=True)):
    print("begin", flush=True)
    stager = Stager(corpus, manifest, cache, cache_bytes=None)
    blocks = [np.arange(manifest.num_chunks)]
    done = stager.stage(blocks, max_chunks=manifest.num_chunks, stop=stop, progress=lambda a, b: None)
    time.sleep(float(sys.argv[3]))
print(done.copied, done.present)
"""


@pytest.fixture
def long_made(tmp_path: Path) -> Made:
    return make(tmp_path / "long", tokens=400_000, chunk_tokens=256, shard_chunks=50)


@pytest.fixture
def stager(long_made: Made, cache: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    started: list[subprocess.Popen[str]] = []

    def start(*, linger_s: float = 0) -> "subprocess.Popen[str]":
        argv = [sys.executable, "-P", "-c", CODE, str(long_made.path), str(cache), str(linger_s)]
        started.append(subprocess.Popen(argv, text=True, stdout=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


def test_two_stagers_do_not_do_the_work_twice(
    stager: Callable[..., "subprocess.Popen[str]"], long_made: Made
) -> None:
    processes = [stager(linger_s=0.5), stager(linger_s=0.5)]
    ends = sorted(process.communicate(timeout=60)[0].split("\n")[-2] for process in processes)
    count = long_made.manifest.num_chunks
    assert ends == sorted([f"{count} 0", f"0 {count}"])


def test_a_killed_stager_leaves_nothing_in_the_way(
    stager: Callable[..., "subprocess.Popen[str]"], long_made: Made, cache: Path
) -> None:
    seed = int(os.environ.get("LMSCALE_TEST_SEED", random.randrange(1 << 32)))
    print(f"LMSCALE_TEST_SEED={seed}")
    chance = random.Random(seed)
    partly = 0
    for _ in range(4):
        process = stager()
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        copies = list(corpus_cache_folder(cache, long_made.manifest).glob("*.chunk"))
        partly += 0 < len(copies) < long_made.manifest.num_chunks
    out = stager().communicate(timeout=60)[0].split()
    assert int(out[-1]) + int(out[-2]) == long_made.manifest.num_chunks
    assert len(cached(long_made, cache)) == long_made.manifest.num_chunks
    assert partly, "no kill met the copying: the corpus is too small for this machine"
    want = read_all(long_made.path)
    assert read_all(without_tokens(long_made.path), cache) == want
