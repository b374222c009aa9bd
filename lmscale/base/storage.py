"""One interface to where corpora, checkpoints and run folders lie, with the local file system behind it.

Readers open files and read ranges; writers create whole objects; nothing is changed in place. An object
store can be a second implementation: names are texts with "/" below one root, and there is no lock, no
rename and no modification time.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from lmscale.base.closing import Closing
from lmscale.base.fs import (
    atomic_write,
    create_exclusively,
    fsync_dir,
    open_descriptor,
    read_regular,
)
from lmscale.base.lru import LruCache

# A read that fails with one of these may succeed when it is repeated: it proves nothing about the data.
TRANSIENT_ERRORS = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENOTCONN, errno.ECONNRESET, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
})  # fmt: skip


class RangeReader(Protocol):
    """An open object, read at any position. Threads may share it."""

    @property
    def size(self) -> int:
        """Bytes of the object now. Raises OSError."""
        ...

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view with the bytes from `offset` on; fewer only at the end. Raises OSError.

        Returns how many bytes were read.
        """
        ...

    def close(self) -> None:
        """Close it; a second call does nothing."""
        ...


class Storage(Protocol):
    """Named objects below one root. Missing ones raise FileNotFoundError, other failures OSError."""

    def open(self, name: str, max_bytes: int | None = None) -> RangeReader:
        """Open an object. Raises UnsuitableFile for what is not one or has more than `max_bytes`."""
        ...

    def read(self, name: str, max_bytes: int) -> bytes:
        """All bytes of an object of at most `max_bytes`; UnsuitableFile where it has more."""
        ...

    def size(self, name: str) -> int:
        """Bytes of an object."""
        ...

    def exists(self, name: str) -> bool:
        """Whether an object can be opened now: by opening it, as caches of stat may be old (NFS)."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Names directly below a prefix, sorted; a folder's name ends in "/". Empty: nothing there."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """Create an object, durably. Raises FileExistsError where it exists."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Give an object this content, durably: a reader sees the old one or the new one."""
        ...

    def delete(self, name: str) -> None:
        """Delete an object; a missing one is no error."""
        ...


class LocalFile(Closing):
    """An open regular file; see RangeReader."""

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self._descriptor = open_descriptor(path, max_bytes)

    @property
    def size(self) -> int:
        """Bytes of the file now. Raises OSError."""
        return os.fstat(self._descriptor).st_size

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the view with the bytes from `offset` on; fewer only at the end. Raises OSError."""
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class LocalStorage:
    """A folder of a file system; see Storage. Names cannot lead out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, name: str, max_bytes: int | None = None) -> LocalFile:
        """Open a regular file. Raises UnsuitableFile, FileNotFoundError, OSError."""
        return LocalFile(self._path(name), max_bytes)

    def read(self, name: str, max_bytes: int) -> bytes:
        """All bytes of a file. Raises UnsuitableFile, FileNotFoundError, OSError."""
        return read_regular(self._path(name), max_bytes)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self.open(name) as file:
            return file.size

    def exists(self, name: str) -> bool:
        """Whether the file can be opened now."""
        try:
            self.open(name).close()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Names in a folder; those of folders end in "/"."""
        try:
            with os.scandir(self._path(prefix) if prefix else self.root) as entries:
                return sorted(entry.name + "/" * entry.is_dir() for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def create(self, name: str, data: bytes) -> None:
        """Create a file, durably. Raises FileExistsError, OSError."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        create_exclusively(path, data)

    def replace(self, name: str, data: bytes) -> None:
        """Replace a file, durably. Raises OSError."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)

    def delete(self, name: str) -> None:
        """Delete a file, durably; a missing one is no error. Raises OSError."""
        path = self._path(name)
        with suppress(FileNotFoundError):
            path.unlink()
            fsync_dir(path.parent)

    def _path(self, name: str) -> Path:
        parts = name.split("/")
        if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{name!r} is not the name of an object")
        return self.root.joinpath(*parts)


class OpenFiles:
    """A bounded number of open files, the least recently used ones are closed. One thread at a time."""

    def __init__(self, *, max_open: int) -> None:
        self._files: LruCache[Path, LocalFile] = LruCache(max_open, on_drop=LocalFile.close)

    def get(self, path: Path) -> LocalFile:
        """The open file. Raises UnsuitableFile and OSError as LocalFile does."""
        file = self._files.get(path)
        if file is None:
            self._files.make_room(1)
            file = LocalFile(path)
            self._files.put(path, file)
        return file

    def forget(self, path: Path) -> None:
        """Close a file whose handle may be stale: the next `get` opens it again."""
        self._files.pop(path)

    def close(self) -> None:
        """Close all files; a later `get` opens them again."""
        self._files.clear()
