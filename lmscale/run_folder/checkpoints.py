"""A checkpoint's manifest.json: what each of its bytes must be, so that damage can be proven.

Written last, after every file is synced. It carries a digest of itself, the size of every file and
the CRC32C of every block of it. Only what these disprove counts as damage; a read that fails is an
error of the storage, to be retried.

Which checkpoints of a run folder count, newest first.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NotRequired, TypedDict

from lmscale.base.decoding import Length, Limits, Range, RecordError, convert, decode_file
from lmscale.base.errors import CheckpointError, ConfigError
from lmscale.base.fs import UnsuitableFile, atomic_write, fsync_dir, open_regular, storage_error
from lmscale.run_folder.attempts import Fence, fence
from lmscale.run_folder.paths import RunFolder, checkpoint_name, parse_checkpoint_name

MANIFEST = "manifest.json"
FORMAT = 1
BLOCK_BYTES = 4 << 20
_MAX_BYTES = 1 << 30  # a checkpoint of 100 TB with 100,000 parts has 500 MB
_FIELDS = ("format", "step", "attempt", "files")
# File systems leave these behind by themselves (NFS silly renames, ext4); they are not reported.
_FOREIGN = (".nfs", "lost+found")


_Count = Annotated[int, Range(0)]


class FileEntry(TypedDict):
    """The manifest's entry of one file."""

    bytes: _Count
    block_bytes: Annotated[int, Range(1)]
    crc32c: list[Annotated[int, Range(0, 0xFFFFFFFF)]]  # one per block


class TensorPart(TypedDict):
    """Where a box of a tensor lies."""

    offsets: list[_Count]
    sizes: list[_Count]
    file: str
    bytes: Annotated[
        list[_Count], Length(2, 2)
    ]  # first byte in the file, and the one after the last


class TensorEntry(TypedDict):
    """The manifest's entry of one tensor."""

    dtype: str
    shape: list[_Count]
    parts: list[TensorPart]


class CheckpointManifest(TypedDict):
    """What every manifest has; the training state beside it is read by who wrote it."""

    format: Annotated[int, Range(1)]
    step: _Count
    attempt: _Count
    files: dict[str, FileEntry]
    tensors: NotRequired[dict[str, TensorEntry]]


def write_manifest(directory: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint folder whose files are all written and synced."""
    missing = [name for name in _FIELDS if name not in body]
    assert not missing, f"manifest without {missing}"
    plain = json.loads(
        json.dumps(body, allow_nan=False)
    )  # as a reader will see it: text keys, lists
    sealed = {**plain, "digest": digest(plain)}
    atomic_write(directory / MANIFEST, (json.dumps(sealed) + "\n").encode())


def read_manifest(directory: Path) -> dict[str, Any]:
    """The body of the manifest, its digest checked and left out. CheckpointError when damaged."""
    path = directory / MANIFEST
    try:
        body = decode_file(dict[str, Any], path, limits=Limits(max_bytes=_MAX_BYTES), hint=_NEXT)
        if body.pop("digest", None) != digest(body):
            raise CheckpointError(f"{path} does not match its own digest; {_NEXT}")
        if type(body.get("format")) is int and body["format"] > FORMAT:
            # Not damage: falling back to an older checkpoint would throw sound work away.
            raise ConfigError(
                f"{path} has format {body['format']}, this lmscale supports {FORMAT}; update lmscale"
            )
        return dict(convert(CheckpointManifest, body, where=path, hint=_NEXT))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} is missing, so the checkpoint is not complete; {_NEXT}"
        ) from error
    except OSError as error:
        raise storage_error(f"reading {path}", error) from error
    except (RecordError, UnsuitableFile) as error:
        raise CheckpointError(str(error)) from error


_NEXT = "use another checkpoint of the run (lmscale verify RUN lists them)"


def digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of the body as canonical JSON."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_file(path: Path, *, block_bytes: int = BLOCK_BYTES) -> dict[str, Any]:
    """The manifest's entry of a file, read from disk: size and the CRC32C of each block."""
    with open_regular(path) as file:
        sums = list(_block_sums(file, block_bytes))
        size = os.fstat(file.fileno()).st_size
    return {"bytes": size, "block_bytes": block_bytes, "crc32c": sums}


def damage(
    directory: Path, *, deep: bool = False, progress: Callable[[int], None] | None = None
) -> list[str]:
    """The proven damage of a checkpoint, one sentence each; empty if there is none.

    Cheap by default: manifest, names and sizes. `deep` reads every byte and calls `progress` with
    the number of bytes since the last call. Raises RetryableError when the storage cannot be read.
    """
    try:
        body = read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    named = parse_checkpoint_name(directory.name)
    if named is not None and named != (body["step"], body["attempt"]):
        own = checkpoint_name(body["step"], body["attempt"])
        problems.append(f"{directory}: its manifest names {own}; rename it back")
    for name, entry in body["files"].items():
        # The digest is no signature: a name must not lead out of the folder.
        if name != Path(name).name:
            problems.append(f"{directory}: {name!r} is not a plain file name")
        else:
            problems += _file_damage(directory / name, entry, deep=deep, progress=progress)
    return problems


def unknown_files(directory: Path) -> list[str]:
    """Names in the folder that the manifest does not list. To be reported; they do no harm."""
    known = {MANIFEST, *read_manifest(directory)["files"]}
    return sorted(n for n in os.listdir(directory) if n not in known and not n.startswith(_FOREIGN))


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name. The caller has checked the fence just before."""
    fsync_dir(temporary)
    os.rename(temporary, final)
    fsync_dir(final.parent)


def _file_damage(
    path: Path, entry: Mapping[str, Any], *, deep: bool, progress: Callable[[int], None] | None
) -> list[str]:
    try:
        if (
            not deep
        ):  # rank 0 looks at every part of every checkpoint at each save, while its peers wait
            found = os.stat(path)
            regular = stat.S_ISREG(found.st_mode)
            wrong = f"{found.st_size} bytes, expected {entry['bytes']}"
            if regular and found.st_size == entry["bytes"]:
                return []
            return [f"{path}: {wrong}" if regular else f"{path} is not a regular file"]
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                return [f"{path}: {size} bytes, expected {entry['bytes']}"]
            return list(_wrong_blocks(path, file, entry, progress))
    except FileNotFoundError:
        return [f"{path}: missing"]
    except UnsuitableFile as error:
        return [str(error)]
    except OSError as error:
        raise storage_error(f"reading {path}", error) from error


def _wrong_blocks(
    path: Path,
    file: BinaryIO,
    entry: Mapping[str, Any],
    progress: Callable[[int], None] | None,
) -> Iterator[str]:
    block_bytes, expected = entry["block_bytes"], entry["crc32c"]
    found = list(_block_sums(file, block_bytes, progress))
    if len(found) != len(expected):
        yield f"{path}: {len(found)} blocks, the manifest lists {len(expected)}"
        return
    for index, (got, want) in enumerate(zip(found, expected, strict=True)):
        if got != want:
            start = index * block_bytes
            stop = min(start + block_bytes, entry["bytes"])
            yield f"{path}: CRC32C {got:08x}, expected {want:08x} (bytes {start}-{stop})"


def _block_sums(
    file: BinaryIO, block_bytes: int, progress: Callable[[int], None] | None = None
) -> Iterator[int]:
    from crc32c import crc32c

    while block := _read_full(file.fileno(), block_bytes):
        if progress is not None:
            progress(len(block))
        yield crc32c(block)


def _read_full(descriptor: int, size: int) -> bytes:
    # A raw read may return less than asked for; a short block would look like damage.
    parts = []
    while size and (part := os.read(descriptor, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """One published checkpoint folder, and why it does not count, if so."""

    step: int
    attempt: int
    path: Path
    fenced: str = ""  # which attempt overtook it
    damaged: tuple[str, ...] = ()  # proofs of damage

    @property
    def valid(self) -> bool:
        """Whether the run may resume from it."""
        return not self.fenced and not self.damaged

    @property
    def reason(self) -> str:
        """Why it does not count; empty when it does."""
        return self.fenced or "; ".join(self.damaged)


def listing(
    folder: RunFolder, *, deep: bool = False, ignoring: int | None = None
) -> list[CheckpointEntry]:
    """All published checkpoints, highest step first, each judged by the fence and its manifest.

    `deep` reads every byte. `ignoring` leaves out one attempt: so that attempt itself checks whether
    it resumed from the newest checkpoint. Not-yet-published folders (.tmp) are not listed.
    """
    rule = fence(folder)
    found = []
    for name in _names(folder):
        if (parsed := parse_checkpoint_name(name)) is None:
            if name.startswith("step-") and not name.endswith(".tmp"):
                found.append(_unnamed(folder.checkpoints / name))
            continue
        problems = tuple(damage(folder.checkpoints / name, deep=deep))
        if problems and not (folder.checkpoints / name).exists():
            continue  # deleted by retention while we looked
        why = _fenced(rule, *parsed, ignoring=ignoring)
        found.append(CheckpointEntry(*parsed, folder.checkpoints / name, why, problems))
    return sorted(found, key=lambda one: (one.step, one.attempt), reverse=True)


def newest_valid(folder: RunFolder, *, damaged: Collection[Path] = ()) -> CheckpointEntry | None:
    """The checkpoint to resume from; None for a run that has never saved one.

    `damaged`: folders that a load has proven damaged, which the cheap check here cannot see. Raises
    CheckpointError rather than let a run that had checkpoints start from step 0 again.
    """
    unfenced = [one for one in listing(folder) if not one.fenced]
    for one in unfenced:
        if one.valid and one.path not in damaged:
            return one
    if unfenced:
        proofs = "\n  ".join(f"{one.path.name}: {one.reason or 'damaged'}" for one in unfenced)
        raise CheckpointError(
            f"{folder.checkpoints}: every checkpoint is proven damaged; restore one from a copy, "
            f"or start in another train.run_dir\n  {proofs}"
        )
    if reached := fence(folder).reached():
        raise CheckpointError(
            f"{folder.checkpoints}: the run resumed from step {reached} before, but none of its "
            "checkpoints is left; restore one, or start in another train.run_dir"
        )
    return None


def reason_to_reload(
    folder: RunFolder, attempt: int, *, loaded: Path | None, damaged: Collection[Path] = ()
) -> str:
    """Why attempt k, having settled, must load again; empty if it may continue.

    An older attempt may have published, or deleted, between this one's listing and its settling.
    Then this one settles None and loads again. `loaded`: None when it started from step 0.
    """
    candidates = [
        one
        for one in listing(folder, ignoring=attempt)
        if one.valid and one.path not in damaged and one.attempt < attempt
    ]
    if loaded is not None and not loaded.exists():
        return f"{loaded.name} is gone"
    if candidates and candidates[0].path != loaded:
        own = parse_checkpoint_name(loaded.name) if loaded is not None else None
        if own is None or (candidates[0].step, candidates[0].attempt) > own:
            return f"{candidates[0].path.name} has been published meanwhile"
    return ""


def _fenced(rule: Fence, step: int, attempt: int, *, ignoring: int | None) -> str:
    by = rule.fenced_by(step, attempt, ignoring=ignoring)
    return f"overtaken: attempt {by.number} resumed from step {by.from_step}" if by else ""


def _unnamed(path: Path) -> CheckpointEntry:
    return CheckpointEntry(
        -1, 0, path, damaged=(f"{path}: not a checkpoint's name (step-00000010-a1)",)
    )


def _names(folder: RunFolder) -> list[str]:
    try:
        return os.listdir(folder.checkpoints)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(f"listing {folder.checkpoints}", error) from error
