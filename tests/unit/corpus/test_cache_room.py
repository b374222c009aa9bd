"""A cache folder whose disk fails, fills or is changed by others while it is staged into."""

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from lmscale.base.errors import ConfigError
from lmscale.corpus import node_cache as room
from lmscale.corpus import staging
from lmscale.corpus.node_cache import cache_lock, chunk_path, copy_sizes, corpus_cache_folder
from lmscale.corpus.staging import Stager, StagingResult
from tests.support.corpora import Made, make


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path / "corpus", tokens=630)


def stage(made: Made, cache: Path, *chunks: int) -> StagingResult:
    stop = threading.Event()
    with cache_lock(cache, stop, say=print):
        stager = Stager(made.path, made.manifest, cache, cache_bytes=None)
        return stager.stage(
            [np.array(chunks, dtype=np.int64)], max_chunks=10, stop=stop, progress=lambda a, b: None
        )


def test_a_disk_that_fails_is_no_error_of_the_run_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    used, new = tmp_path / "used", tmp_path / "new"
    with cache_lock(used, threading.Event(), say=print):
        pass
    monkeypatch.setattr(room.os, "open", read_only)
    with (
        pytest.raises(OSError, match="Read-only") as error,
        cache_lock(used, threading.Event(), say=print),
    ):
        pass
    assert not isinstance(error.value, ConfigError)
    with (
        pytest.raises(ConfigError, match="Read-only"),
        cache_lock(new, threading.Event(), say=print),
    ):
        pass


def test_an_empty_copy_counts_as_none(made: Made, tmp_path: Path) -> None:
    """As a power cut leaves it."""
    cache = tmp_path / "cache"
    stage(made, cache, 0, 1, 2)
    chunk_path(corpus_cache_folder(cache, made.manifest), 1).write_bytes(b"")
    done = stage(made, cache, 0, 1, 2)
    assert (done.present, done.copied) == (2, 1)
    assert chunk_path(corpus_cache_folder(cache, made.manifest), 1).stat().st_size


def test_what_is_no_copy_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "00000003.chunk").write_bytes(b"abc")
    for name in ("00000004", "chunk", "x.chunk", ".chunk", "00000005.chunk.77.tmp"):
        (tmp_path / name).write_bytes(b"abc")
    (tmp_path / "00000006.chunk").symlink_to(tmp_path / "nothing")  # as if a reader removed it
    assert copy_sizes(tmp_path) == {3: 3}


def test_a_disk_that_others_fill_keeps_its_margin(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old copies make room as long as there are any; then the copying ends."""
    cache, asked = tmp_path / "cache", 0
    stage(made, cache, 7, 8, 9)

    def left(_: Path) -> int:
        nonlocal asked
        asked += 1
        return 1 << 30 if asked <= 2 else 0

    monkeypatch.setattr(staging, "free_disk_bytes", left)
    done = stage(made, cache, 0, 1, 2, 3, 4)
    assert done.stopped_by == "its disk is full"
    assert (done.copied, done.evicted) == (2, 3)
    assert len(copy_sizes(corpus_cache_folder(cache, made.manifest))) == 2


def test_thousands_of_old_copies_may_have_to_go_for_one(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    stage(made, cache, 0)
    folder = corpus_cache_folder(cache, made.manifest)
    for chunk in range(100, 3000):
        chunk_path(folder, chunk).write_bytes(b"x")
    monkeypatch.setattr(staging, "THREADS", 1)
    monkeypatch.setattr(
        staging, "free_disk_bytes", lambda folder: 0 if len(os.listdir(folder)) > 1 else 1 << 30
    )
    done = stage(made, cache, 0, 1)
    assert (done.copied, done.evicted, done.stopped_by) == (1, 2900, "")
