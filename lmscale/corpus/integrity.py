"""Check every byte of a corpus against its digests: what `lmscale verify PATH` prints for a corpus.

A shard's SHA-256 covers all its bytes, with tar headers and padding. The CRCs that training checks are
checked as well, by the same code, and name the damaged chunk. Shards are read in parallel: hashing
releases the interpreter lock.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmscale.base.errors import LmscaleError
from lmscale.base.fs import UnsuitableFile, open_regular
from lmscale.corpus.checked_files import CheckedFiles
from lmscale.corpus.manifest import (
    MANIFEST_NAME,
    Collection,
    Manifest,
    corpus_kind,
    manifest_digest,
    tokenizer_path,
)
from lmscale.corpus.reader import ChunkReader

Progress = Callable[[int, int], None]  # bytes done, bytes in total

_READ_BYTES = 1 << 22
_MAX_PROBLEMS_PER_SHARD = 8
_FILE_SYSTEM_NAMES = (".nfs", "lost+found")  # files of the file system itself


def verify(path: Path, progress: Progress | None = None) -> list[str]:
    """Problems of a corpus or of a collection; an empty list means that every byte is sound.

    Damage is never raised. `progress` is called in this thread, once per shard.
    """
    try:
        folders = [path] if corpus_kind(path) != "collection" else None
        parts = {} if folders else Collection.load(path).parts
    except LmscaleError as error:
        return [str(error)]
    problems = list(_unknown(path, {MANIFEST_NAME, *parts})) if parts else []
    for name, digest in parts.items():
        problems += _covered(path / name, digest)
    manifests: dict[Path, Manifest] = {}
    for folder in folders or [path / name for name in parts]:
        try:
            manifests[folder] = Manifest.load(folder)
        except LmscaleError as error:
            problems.append(str(error))
    return problems + _contents(manifests, progress)


def _covered(part: Path, digest: str) -> Iterator[str]:
    """A part's manifest must be the one that its collection names; damage is reported elsewhere."""
    try:
        found = manifest_digest(part)
    except LmscaleError:
        return
    if found != digest:
        yield f"{part / MANIFEST_NAME}: digest {found}, its collection covers {digest}"


def _contents(manifests: dict[Path, Manifest], progress: Progress | None) -> list[str]:
    problems: list[str] = []
    shards = [(f, m, number) for f, m in manifests.items() for number in range(len(m.shards))]
    total = sum(manifest.shards[number].bytes for _, manifest, number in shards)
    done = 0
    for folder, manifest in manifests.items():
        problems += _beside_shards(folder, manifest)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = pool.map(lambda shard: list(_shard(*shard)), shards)
        for (_, manifest, number), of_shard in zip(shards, found, strict=True):
            problems += of_shard
            done += manifest.shards[number].bytes
            if progress:
                progress(done, total)
    return problems


def _beside_shards(folder: Path, manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer_path(folder, manifest)
    except LmscaleError as error:
        yield str(error)
    covered = {MANIFEST_NAME, manifest.tokenizer.file, *(shard.name for shard in manifest.shards)}
    if manifest.table_file is not None:
        covered.add(manifest.table_file)
    yield from _unknown(folder, covered)


def _unknown(folder: Path, known: set[str]) -> Iterator[str]:
    for name in sorted(os.listdir(folder)):
        if name not in known and not name.startswith(_FILE_SYSTEM_NAMES):
            yield f"{folder / name}: not part of this corpus, so no digest covers it; move it elsewhere"


def _shard(folder: Path, manifest: Manifest, number: int) -> Iterator[str]:
    entry = manifest.shards[number]
    path = folder / entry.name
    try:
        size, digest = _digest(path)
    except UnsuitableFile as error:
        yield str(error)
        return
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror or error}"
        return
    if size != entry.bytes:
        yield f"{path} has {size} bytes, expected {entry.bytes}"
    damaged = list(_damaged_chunks(folder, manifest, number))
    yield from damaged
    if size == entry.bytes and digest != entry.sha256 and not damaged:
        yield (
            f"{path}: SHA-256 {digest}, expected {entry.sha256}: its chunks are sound, "
            "a tar header or the padding is damaged; restore this file from a copy"
        )


def _digest(path: Path) -> tuple[int, str]:
    sha256, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while data := file.read(_READ_BYTES):
            sha256.update(data)
            size += len(data)
    return size, sha256.hexdigest()


def _damaged_chunks(folder: Path, manifest: Manifest, number: int) -> Iterator[str]:
    files = CheckedFiles(backoff_s=0)
    chunks = ChunkReader(folder, manifest, files)
    count = 0
    try:
        chunks.locate(
            chunks.chunks_of_shard(number)[0]
        )  # without the index no chunk can be checked
        for chunk in chunks.chunks_of_shard(number):
            for problem in _chunk(chunks, chunk):
                yield problem
                count += 1
            if count >= _MAX_PROBLEMS_PER_SHARD:
                yield f"{folder / manifest.shards[number].name}: more chunks may be damaged"
                return
    except LmscaleError as error:
        yield str(error)
    finally:
        files.close()


def _chunk(chunks: ChunkReader, chunk: int) -> Iterator[str]:
    for read in (chunks.tokens, chunks.starts):
        try:
            read(chunk)
        except LmscaleError as error:
            yield str(error)
