"""Atomic writes, exclusive creation, locks and bounded opens, with real faults."""

import errno
import fcntl
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmscale.base import fs
from lmscale.base.errors import ConfigError, RetryableError
from lmscale.base.fs import (
    UnsuitableFile,
    atomic_write,
    atomic_writer,
    create_exclusively,
    lock_folder,
    open_regular,
    read_regular,
    read_text,
    storage_error,
    storage_errors,
)

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts a tmpfs")


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("single_writer", [True, False])
def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(
    tmp_path: Path, durable: bool, single_writer: bool
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a longer old content")
    with atomic_writer(path, durable=durable, single_writer=single_writer) as file:
        file.write(b"new")
        assert path.read_bytes() == b"a longer old content"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_failed_write_keeps_the_old_content_and_removes_its_temporary_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x"
    atomic_write(path, b"old")
    with pytest.raises(TypeError), atomic_writer(path) as file:
        file.writelines([b"half of the ne", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_permissions_follow_the_umask_or_are_exactly_as_given(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "plain", b"")
        atomic_write(tmp_path / "script", b"", mode=0o755)
        atomic_write(tmp_path / "secret", b"", mode=0o600)
        create_exclusively(tmp_path / "new", b"", mode=0o600)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"plain": 0o640, "script": 0o755, "secret": 0o600, "new": 0o600}


_KILLED = """
import sys, time
from pathlib import Path
from lmscale.base.fs import atomic_writer
with atomic_writer(Path(sys.argv[1]), single_writer=True) as file:
    file.write(b"never published")
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_writer_killed_between_write_and_rename_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic_write(path, b"old")
    with subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == b"written\n"
        it.kill()
        it.wait()
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == [".x.tmp", "x"]
    with atomic_writer(path, single_writer=True) as file:  # its successor overwrites the remains
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@needs_root
def test_a_full_disk_keeps_the_old_content_and_is_retryable(small_disk: Path) -> None:
    path = small_disk / "x"
    atomic_write(path, b"old")
    with pytest.raises(RetryableError, match="free some space"), storage_errors("writing"):
        atomic_write(path, bytes(1 << 20))
    with pytest.raises(OSError, match="No space"):
        create_exclusively(small_disk / "y", bytes(1 << 20))
    assert path.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["x"]


def test_of_many_creators_exactly_one_succeeds(tmp_path: Path) -> None:
    path, winners, barrier = tmp_path / "x", [], threading.Barrier(8)

    def create(number: int) -> None:
        barrier.wait()
        try:
            create_exclusively(path, str(number).encode())
        except FileExistsError:
            return
        winners.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_text()] == [str(number) for number in winners]


def test_errors_of_the_user_and_of_the_storage() -> None:
    def classified(number: int) -> object:
        return type(storage_error("writing x", OSError(number, os.strerror(number))))

    for number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
        assert classified(number) is ConfigError
    for number in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOENT):
        assert classified(number) is RetryableError


# ---- locks ---------------------------------------------------------------------------------------

_HOLDER = """
import sys, time
from pathlib import Path
from lmscale.base.fs import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_lock_waits_and_is_free_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    waits: list[float] = []
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(path)], stdout=subprocess.PIPE) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == b"locked\n"
        with lock_folder(path, timeout_s=0.1, on_wait=lambda: waits.append(1)) as late:
            assert not late.acquired
        stop = threading.Event()
        stop.set()
        with lock_folder(path, stop=stop) as stopped:
            assert not stopped.acquired
        killer = threading.Timer(0.2, it.kill)
        killer.start()
        with lock_folder(path) as mine:
            assert mine.acquired
            assert mine.supported
        killer.join()
    assert waits == [1]


def test_a_child_that_inherits_the_descriptor_holds_the_lock_too(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock_folder(path) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.descriptor])
    with child:
        with lock_folder(path, timeout_s=0) as other:
            assert not other.acquired
        child.kill()
        child.wait()
    with lock_folder(path, timeout_s=0) as free:
        assert free.acquired


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_a_warning_unless_the_lock_is_required(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    def refuses(file: object, what: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuses)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            lock_folder(tmp_path / ".lock")
        return
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with lock_folder(tmp_path / ".lock") as lock:
                assert lock.acquired
                assert not lock.supported
    assert caplog.text.count("locking is not supported here") == 1
    with pytest.raises(OSError, match=os.strerror(number)):
        lock_folder(tmp_path / ".lock", required=True)


def test_a_failed_lock_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: object, what: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", interrupted)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        lock_folder(tmp_path / ".lock")
    assert len(os.listdir("/proc/self/fd")) == before


# ---- opening -------------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(str(path))


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _terminal(path: Path) -> None:
    path.symlink_to("/dev/ptmx")


@pytest.mark.parametrize("make", [_fifo, _socket, Path.mkdir, _endless, _terminal])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, make: object) -> None:
    path = tmp_path / "x"
    make(path)  # type: ignore[operator]
    before = len(os.listdir("/proc/self/fd"))
    signal.alarm(10)  # a blocking open would end the test run
    try:
        for read in (open_regular, lambda p: read_regular(p, 10)):
            with pytest.raises(UnsuitableFile, match="not a regular file"):
                read(path)
    finally:
        signal.alarm(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_size_is_bounded_also_where_it_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(UnsuitableFile, match="at most 4"):
        read_regular(path, 4)
    with pytest.raises(UnsuitableFile, match="at most 4"):
        open_regular(path, 4)
    assert os.stat("/proc/self/status").st_size == 0
    with pytest.raises(UnsuitableFile, match="at most 4"):
        read_regular(Path("/proc/self/status"), 4)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")
    path.write_bytes(b"")
    assert read_regular(path, 0) == b""


def test_text_that_is_not_utf_8_is_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a\xffb\n")
    assert read_text(tmp_path / "x") == "a\ufffdb\n"


def test_a_sparse_file_of_a_terabyte_is_refused_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, 1 << 40)
    begun = time.process_time()
    with pytest.raises(UnsuitableFile):
        read_regular(path, 1 << 20)
    assert time.process_time() - begun < 1


def test_fsync_of_a_folder_that_is_none(tmp_path: Path) -> None:
    fs.fsync_dir(tmp_path)
    (tmp_path / "x").touch()
    with pytest.raises(NotADirectoryError):
        fs.fsync_dir(tmp_path / "x")
