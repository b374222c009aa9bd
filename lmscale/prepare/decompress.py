"""Compressed input as a stream of bytes that never ends early in silence."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import zstandard

from lmscale.errors import DataError, RetryableError
from lmscale.prepare.inputs import Source

# Compressed bytes given to zstd at a time: bounds the output of one call, 130 KiB for ordinary text.
_ZSTD_BLOCK = 1 << 15


class _ZstdFile(io.RawIOBase):
    """Frames of zstd, one after the other. zstandard's own stream_reader ends at a cut without a word."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False  # a frame has begun and not ended
        self._held = memoryview(b"")
        self._unused = b""  # read, but behind the end of its frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        """Fill the buffer; 0 at the end of the last frame. Raises EOFError inside a frame."""
        view = memoryview(cast(bytearray, buffer)).cast("B")
        while not self._held:
            block = self._unused or self._file.read(_ZSTD_BLOCK)
            self._unused = b""
            if not block and self._inside:
                raise EOFError("the file ends inside a zstd frame")
            if not block:
                return 0
            self._inside = True
            self._held = memoryview(self._frame.decompress(block))
            if self._frame.eof:
                self._unused = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._inside = False
        count = min(len(view), len(self._held))
        view[:count] = self._held[:count]
        self._held = self._held[count:]
        return count


def decompressed(source: Source, file: BinaryIO) -> BinaryIO:
    """The text of an open source as bytes."""
    if source.compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if source.compression == "zstd":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(file), 1 << 20))
    return file


@contextmanager
def explained(source: Source, stream: BinaryIO) -> Iterator[None]:
    """Turn what the libraries raise while reading a source into words.

    Damage inside a compressed file often shows as strange text first: its checksum comes last. So
    before a complaint about the text goes out, the rest is read, and damage found there is what is told.
    """
    with _libraries(source):
        try:
            yield
        except DataError:
            while source.compression and stream.read(1 << 20):
                pass
            raise


@contextmanager
def _libraries(source: Source) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise DataError(
            f"input {source.path}: truncated, the {source.compression} stream has no end; fetch it anew"
        ) from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"input {source.path}: not sound {source.compression} data: {error}; fetch it anew"
        ) from error
    except OSError as error:
        raise RetryableError(
            f"input {source.path}: reading failed: {error.strerror or error}; "
            "run the same command again, it goes on where it stopped"
        ) from error
