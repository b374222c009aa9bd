"""The input files, their order, the slices that workers process, and their decompression.

A truncated compressed file is an error: its end is never taken for the end of the text.
"""

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from lmscale.base.errors import DataError, RetryableError, UsageError

MIN_SLICE_BYTES = 4 << 20
MAX_SLICES = (
    4096  # approximate: one terabyte has slices of 256 MiB and few files in the scratch folder
)
MAX_SLICE_FILES = 4096

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_REFUSED = {".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".lz4", ".parquet", ".arrow"}
_LINES = {".jsonl", ".ndjson"}


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file as it was when the work was planned."""

    path: str  # absolute
    format: str  # "text": the file is one document | "lines": JSON Lines, one document per line
    compression: str  # "" | "gzip" | "zstd"
    size: int  # bytes on disk
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a source; for JSON Lines, the lines that begin in this range."""

    source: InputFile
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Slice:
    """The spans of the input that one job reads; they do not depend on the number of workers."""

    number: int
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(span.stop - span.start for span in self.spans)

    def as_json(self) -> dict[str, Any]:
        """A JSON value, to send to a worker process."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Slice":
        """The inverse of `as_json`."""
        spans = (
            Span(InputFile(**span["source"]), span["start"], span["stop"])
            for span in value["spans"]
        )
        return cls(value["number"], tuple(spans))


def discover(inputs: Sequence[Path], out: Path) -> list[InputFile]:
    """All files of the inputs: arguments in their order, folders by path; names with a leading dot are left out.

    Raises UsageError for an input that is missing or contains OUT, DataError for one that cannot be read.
    """
    if not inputs:
        raise UsageError("no input: name at least one text file, JSON Lines file or folder")
    sources: list[InputFile] = []
    for argument in inputs:
        path = argument.absolute()
        if not path.exists():
            raise UsageError(f"input {argument}: no such file or folder")
        if not path.is_dir():
            sources.append(_source(path))
            continue
        if out.absolute().is_relative_to(path):
            raise UsageError(
                f"input {argument} contains the output {out}, which would be read as text; "
                "write the corpus outside the input folder"
            )
        files = [_source(file) for file in _files(path)]
        if not files:
            raise DataError(
                f"input {argument}: the folder contains no files; give a folder with text files"
            )
        sources += files
    paths: set[str] = set()
    for source in sources:
        if source.path in paths:
            raise UsageError(
                f"input {source.path} is given twice; name each file or its folder once"
            )
        paths.add(source.path)
    if not any(source.size for source in sources):
        raise DataError(
            f"input: all {len(sources)} files are empty, e.g. {sources[0].path}; there is no text"
        )
    return sources


def slices(sources: Sequence[InputFile]) -> list[Slice]:
    """Cut the input into slices of similar size; depends on the sources alone.

    Plain JSON Lines are cut inside; a compressed file or a document is read by one worker from end to end.
    """
    total = sum(source.size for source in sources)
    target = max(MIN_SLICE_BYTES, -(-total // MAX_SLICES))
    result: list[Slice] = []
    spans: list[Span] = []  # of the next slice
    num_bytes = 0

    def close() -> None:
        nonlocal num_bytes
        if spans:
            result.append(Slice(len(result), tuple(spans)))
            spans.clear()
            num_bytes = 0

    for source in sources:
        if source.format == "lines" and not source.compression and source.size > target:
            close()
            count = -(-source.size // target)
            cuts = [source.size * index // count for index in range(count + 1)]
            for start, stop in pairwise(cuts):
                spans.append(Span(source, start, stop))
                close()
            continue
        spans.append(Span(source, 0, source.size))
        num_bytes += source.size
        if num_bytes >= target or len(spans) >= MAX_SLICE_FILES:
            close()
    close()
    return result


def open_source(source: InputFile) -> BinaryIO:
    """The raw bytes of a source. Raises DataError if the file has changed since the work was planned."""
    try:
        file = open(source.path, "rb")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise DataError(f"input {source.path}: cannot be read: {error.strerror}") from error
    check_unchanged(source, file)
    return file


def check_unchanged(source: InputFile, file: BinaryIO) -> None:
    """Raise DataError if the open file is not as it was when the work was planned."""
    now = os.fstat(file.fileno())
    if (now.st_size, now.st_mtime_ns) != (source.size, source.mtime_ns):
        file.close()
        raise DataError(
            f"input {source.path}: changed while it was being prepared; "
            "run the same command again when nothing writes to it"
        )


def _files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"input {error.filename}: cannot be read: {error.strerror}") from error

    paths: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    # By path parts, as bytes: the order is the same on every machine and in every locale.
    return map(Path, sorted(paths, key=lambda path: os.fsencode(path).split(b"/")))


def _source(path: Path) -> InputFile:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _REFUSED:
        raise DataError(
            f"input {path}: {suffixes[-1]} is not supported; give UTF-8 text or JSON Lines, plain, .gz or .zst"
        )
    compression = _COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    inner = suffixes[:-1] if compression else suffixes
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"input {path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"input {path}: not a regular file; copy its content to a file first")
    kind = "lines" if inner and inner[-1] in _LINES else "text"
    return InputFile(str(path), kind, compression, status.st_size, status.st_mtime_ns)


# Compressed bytes given to zstd at a time: bounds the output of one call, 130 KiB for ordinary text.
_ZSTD_BLOCK = 1 << 15


class _ZstdFile(io.RawIOBase):
    """Consecutive frames of zstd. zstandard's own stream_reader ends at a truncation without an error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False  # a frame has begun and not ended
        self._output = memoryview(b"")
        self._unused = b""  # compressed bytes that were read past the end of a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        """Fill the buffer; 0 at the end of the last frame. Raises EOFError inside a frame."""
        view = memoryview(cast(bytearray, buffer)).cast("B")
        while not self._output:
            block = self._unused or self._file.read(_ZSTD_BLOCK)
            self._unused = b""
            if not block and self._inside:
                raise EOFError("the file ends inside a zstd frame")
            if not block:
                return 0
            self._inside = True
            self._output = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._unused = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._inside = False
        count = min(len(view), len(self._output))
        view[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def decompressed(source: InputFile, file: BinaryIO) -> BinaryIO:
    """The text of an open source as bytes."""
    if source.compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if source.compression == "zstd":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(file), 1 << 20))
    return file


@contextmanager
def read_errors(source: InputFile, stream: BinaryIO) -> Iterator[None]:
    """Turn errors of the decompression libraries and of reads into DataError and RetryableError.

    Damage inside a compressed file often appears as invalid text first, because its checksum comes
    last. So before an error about the text is raised, the rest is read, and damage found there is
    reported instead.
    """
    with _libraries(source):
        try:
            yield
        except DataError:
            while source.compression and stream.read(1 << 20):
                pass
            raise


@contextmanager
def _libraries(source: InputFile) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise DataError(
            f"input {source.path}: truncated, the {source.compression} stream has no end; download it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"input {source.path}: damaged {source.compression} data: {error}; download it again"
        ) from error
    except OSError as error:
        raise RetryableError(
            f"input {source.path}: reading failed: {error.strerror or error}; "
            "run the same command again: it resumes where it stopped"
        ) from error
