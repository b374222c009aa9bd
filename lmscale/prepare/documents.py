"""The documents of an input in order, as streams of text blocks, and the text to train a vocabulary on.

A vocabulary is trained on all of a small input and on an even sample of a large one.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from lmscale.base.errors import DataError
from lmscale.prepare.inputs import (
    InputFile,
    Slice,
    Span,
    check_unchanged,
    decompressed,
    open_source,
    read_errors,
)
from lmscale.tokenizer.training import split_text

Document = Iterator[
    str
]  # blocks of one document; they must be consumed before the next document is requested

_BLOCK_BYTES = 1 << 20
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}


def documents(
    input_slice: Slice, text_key: str, consumed: Callable[[int], None] = lambda _: None
) -> Iterator[Document]:
    """All documents of a slice in order, empty ones included.

    `consumed` is called repeatedly with the bytes on disk that have been read. Raises DataError with
    file and place: not UTF-8 (byte offset), broken JSON or no text (line number), damaged compression.
    """
    done = 0
    for span in input_slice.spans:
        with open_source(span.source) as file:
            stream = decompressed(span.source, file)
            with read_errors(span.source, stream):
                if span.source.format == "lines":
                    start = done - span.start
                    for text in _lines(span, stream, text_key):
                        yield iter((text,))
                        consumed(min(start + file.tell(), done + span.stop - span.start))
                else:
                    yield _text(span.source, stream, lambda: consumed(done + file.tell()))  # noqa: B023
            check_unchanged(span.source, file)
        done += span.stop - span.start
        consumed(done)


def slice_sha256(input_slice: Slice) -> str:
    """SHA-256 over the raw bytes of a slice and the way they are decoded; names and times have no influence."""
    total = hashlib.sha256()
    for span in input_slice.spans:
        source = span.source
        total.update(f"{source.format} {source.compression} {span.start} {span.stop}\n".encode())
        with open_source(source) as file, read_errors(source, file):
            file.seek(span.start)
            left = span.stop - span.start
            while left and (block := file.read(min(left, _BLOCK_BYTES))):
                total.update(block)
                left -= len(block)
    return total.hexdigest()


def _text(source: InputFile, stream: BinaryIO, read: Callable[[], None]) -> Document:
    """The one document of a text file, in blocks; a byte order mark at its start is dropped."""
    offset, rest = 0, b""
    with read_errors(source, stream):
        while True:
            block = stream.read(_BLOCK_BYTES)
            data = rest + block
            try:
                text, used = codecs.utf_8_decode(data, "strict", not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(source, offset + error.start, data[error.start], data) from error
            if offset == 0:
                text = text.removeprefix("\ufeff")
            if text:
                yield text
            if not block:
                return
            offset, rest = offset + used, data[used:]
            read()


def _lines(span: Span, stream: BinaryIO, text_key: str) -> Iterator[str]:
    """The text of each JSON line that begins in the span; blank lines are skipped."""
    source = span.source
    whole = bool(source.compression)
    if span.start:
        stream.seek(span.start - 1)
        stream.readline()
    offset = stream.tell() if span.start else 0
    number = 0  # of the line, counted from the start of the span
    while whole or offset < span.stop:
        line = stream.readline()
        if not line:
            return
        number += 1
        if line.strip():
            yield _line_text(source, line, offset, text_key, number if not span.start else None)
        offset += len(line)


def _line_text(
    source: InputFile, line: bytes, offset: int, text_key: str, number: int | None
) -> str:
    def wrong(fact: str) -> DataError:
        line_number = _line_number(source, offset) if number is None else number
        return DataError(f"input {source.path}, line {line_number}: {fact}")

    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(source, offset + error.start, line[error.start], line) from error
    if offset == 0:
        decoded = decoded.removeprefix("\ufeff")
    try:
        # Not base/decoding: other keys of the record may contain anything that json.loads accepts.
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise wrong(f"not JSON: {error}; JSON Lines contain one object per line") from error
    if not isinstance(record, dict):
        raise wrong(f'contains {_kind(record)}, not an object like {{"{text_key}": "..."}}')
    if text_key not in record:
        keys = ", ".join(sorted(map(repr, record))[:8]) or "none"
        raise wrong(f"no key {text_key!r} (keys: {keys}); name the right one with --text-key")
    text = record[text_key]
    if not isinstance(text, str):
        raise wrong(f"key {text_key!r} contains {_kind(text)}, not a text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise wrong(
                f"key {text_key!r}, character {error.start}: half a surrogate pair "
                f"(\\u{ord(text[error.start]):04x}) is not Unicode text; correct or drop the line"
            ) from error
    return text


def _line_number(source: InputFile, offset: int) -> int:
    """The number, from 1, of the line that begins at a byte of a plain file; reads everything before it."""
    count, left = 1, offset
    with open(source.path, "rb") as file:
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _not_utf8(source: InputFile, offset: int, byte: int, data: bytes) -> DataError:
    hint = "convert it (iconv -t UTF-8) or leave it out"
    for magic, suffix in _MAGIC.items():
        if offset < len(magic) and data.startswith(magic):
            hint = f"it seems to be compressed: rename it to end in {suffix}"
    unpacked = " of the decompressed text" if source.compression else ""
    return DataError(
        f"input {source.path}: not UTF-8 at byte {offset}{unpacked} (0x{byte:02x}); {hint}"
    )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value",
             int: "a number", float: "a number"}  # fmt: skip
    return names.get(type(value), "null")


SAMPLE_BYTES = 64 << 20  # 8 s of training on two cores; more text hardly changes the merges


def sample_text(
    input_slices: Sequence[Slice],
    text_key: str,
    consumed: Callable[[int], None],
    limit: int = SAMPLE_BYTES,
) -> Iterator[str]:
    """The same share of every slice, from its beginning, `limit` bytes in all; a document may be cut.

    The result depends only on the input. An uncompressed input of at most `limit` bytes is used whole.
    """
    total = sum(piece.size for piece in input_slices)
    done = 0
    for piece in input_slices:
        quota = piece.size if total <= limit else -(-limit * piece.size // total)
        for document in documents(piece, text_key):
            for text in split_text(document):
                taken = text if len(text) <= quota else _first(text, quota)
                quota -= len(taken) if taken.isascii() else len(taken.encode())
                if taken:
                    yield taken
                if quota <= 0:
                    break
            if quota <= 0:
                break
        done += piece.size
        consumed(done)


def _first(text: str, size: int) -> str:
    """The beginning of a text, at most `size` bytes of UTF-8 without half a character."""
    return codecs.utf_8_decode(text[:size].encode()[:size], "ignore", False)[0]
