"""The local storage and the bounded set of open files; the retry loop."""

import os
from pathlib import Path

import pytest

from lmscale.base.fs import UnsuitableFile
from lmscale.base.retry import retry
from lmscale.base.storage import LocalFile, LocalStorage, OpenFiles, Storage


def test_objects_are_created_once_read_by_ranges_listed_and_deleted(tmp_path: Path) -> None:
    storage: Storage = LocalStorage(tmp_path)
    assert storage.list() == []
    assert not storage.exists("a/b")
    storage.create("a/b", b"0123456789")
    with pytest.raises(FileExistsError):
        storage.create("a/b", b"other")
    storage.create("c", b"")
    assert storage.list() == ["a/", "c"]
    assert storage.list("a") == ["b"]
    assert storage.exists("a/b")
    assert storage.size("a/b") == 10
    assert storage.read("a/b", 10) == b"0123456789"
    file = storage.open("a/b")
    view = memoryview(bytearray(4))
    assert file.read_into(view, 3) == 4
    assert bytes(view) == b"3456"
    assert file.read_into(view, 8) == 2
    assert file.read_into(view, 80) == 0
    file.close()
    file.close()
    storage.replace("a/b", b"new")
    assert storage.read("a/b", 10) == b"new"
    storage.delete("a/b")
    storage.delete("a/b")
    assert not storage.exists("a/b")
    for lost in (lambda: storage.open("a/b"), lambda: storage.size("x")):
        with pytest.raises(FileNotFoundError):
            lost()
    with pytest.raises(UnsuitableFile):
        storage.open("a")
    with pytest.raises(UnsuitableFile):
        storage.read("c", -1)


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a\0b"]
)
def test_names_do_not_lead_out_of_the_root(tmp_path: Path, name: str) -> None:
    storage = LocalStorage(tmp_path)
    for use in (storage.open, storage.delete, lambda n: storage.create(n, b"")):
        with pytest.raises(ValueError, match="not the name"):
            use(name)


def test_open_files_are_bounded_and_the_oldest_goes_first(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(path.name.encode())
    files = OpenFiles(max_open=2)
    first = files.get(paths[0])
    assert files.get(paths[1]) is files.get(paths[1])
    assert files.get(paths[0]) is first
    files.get(paths[2])  # closes 1
    assert files.get(paths[0]) is first
    files.forget(paths[0])
    files.forget(paths[3])
    assert files.get(paths[0]) is not first
    before = len(os.listdir("/proc/self/fd"))
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2
    with LocalFile(paths[3]) as file:
        assert file.size == 1


def test_a_retry_ends_with_success_the_last_failure_or_a_permanent_one() -> None:
    calls, seen = [], []

    def fails(times: int, error: Exception) -> int:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    def attempt(times: int, error: Exception, waits: list[float]) -> int:
        calls.clear()
        return retry(
            lambda: fails(times, error),
            waits_s=waits,
            is_transient=lambda e: isinstance(e, OSError),
            before_retry=seen.append,
        )

    assert attempt(2, OSError("a"), [0, 0]) == 3
    assert len(seen) == 2
    with pytest.raises(OSError, match="b"):
        attempt(3, OSError("b"), [0, 0])
    assert len(calls) == 3
    with pytest.raises(KeyError):
        attempt(1, KeyError("c"), [0, 0])
    assert len(calls) == 1
