"""`lmscale verify PATH`: compare every byte of a corpus, a checkpoint or a whole run with its digests."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lmscale.base.console import byte_progress
from lmscale.base.decoding import Limits, RecordError, decode_file
from lmscale.base.errors import ConfigError, ExitCode, LmscaleError, Problem
from lmscale.base.fs import UnsuitableFile
from lmscale.base.records import read_lines
from lmscale.run_folder.checkpoints import MANIFEST, damage, listing, read_manifest, unknown_files
from lmscale.run_folder.paths import RunFolder

Kind = Literal["corpus", "checkpoint", "run"]
Progress = Callable[[int, int], None]  # bytes done, bytes in total


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was verified, and the problems."""

    kind: Kind
    problems: list[str]
    notes: list[str] = field(default_factory=list)  # information that is not damage


def verify_verb(path: Path, *, as_json: bool) -> ExitCode:
    """Verify a path and print the result. Returns DATA when something is damaged."""
    with byte_progress("verify", sys.stderr) as progress:
        result = verify(path, progress)
    if as_json:
        body = {
            "path": str(path),
            "kind": result.kind,
            "sound": not result.problems,
            "problems": result.problems,
            "notes": result.notes,
        }
        sys.stdout.write(json.dumps(body) + "\n")
    else:
        lines = [*(f"note: {note}" for note in result.notes), *result.problems]
        if not result.problems:
            lines.append(f"{path}: {result.kind}, every byte is sound")
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return ExitCode.DATA if result.problems else ExitCode.DONE


def verify(path: Path, progress: Progress) -> VerifyResult:
    """Read everything under `path`. Raises ConfigError when it cannot be verified."""
    kind = kind_of(path)
    if kind == "corpus":
        from lmscale.corpus.integrity import verify as verify_corpus

        return VerifyResult(kind, verify_corpus(path, progress))
    if kind == "checkpoint":
        return _checkpoints([path], progress)
    return _run(RunFolder(path), progress)


def kind_of(path: Path) -> Kind:
    """The kind of a path, from its files, also when some of them are damaged."""
    folder = RunFolder(path)
    if any(part.exists() for part in (folder.config, folder.attempts, folder.checkpoints)):
        return "run"
    if path.name.startswith("step-"):
        return "checkpoint"
    if (path / MANIFEST).exists():
        return "checkpoint" if _is_checkpoint(path / MANIFEST) else "corpus"
    if path.is_dir() and any(path.glob("*.tar")):
        return "corpus"
    hint = "give a folder made by `lmscale prepare`, a checkpoint (step-*), or a run folder"
    raise ConfigError([Problem("", f"{path}: contains nothing that can be verified", hint)])


def _is_checkpoint(manifest: Path) -> bool:
    try:
        body = decode_file(dict[str, Any], manifest, limits=Limits(max_bytes=1 << 30))
    except (OSError, RecordError, UnsuitableFile):
        return any(manifest.parent.glob("*.safetensors"))
    return {"step", "files"} <= body.keys()


def _checkpoints(paths: list[Path], progress: Progress) -> VerifyResult:
    problems: list[str] = []
    notes: list[str] = []
    total = sum(file.stat().st_size for path in paths for file in path.glob("*") if file.is_file())
    done = 0

    def add(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    for path in paths:
        if not path.is_dir():
            problems.append(f"{path}: missing")
            continue
        damages = damage(path, deep=True, progress=add)
        problems += damages
        if not damages:
            read_manifest(path)
            notes += [f"{path / name}: not part of the checkpoint" for name in unknown_files(path)]
    return VerifyResult("checkpoint", problems, notes)


def _run(folder: RunFolder, progress: Progress) -> VerifyResult:
    problems: list[str] = []
    paths: list[Path] = []
    notes: list[str] = []
    try:
        for checkpoint in listing(folder):
            paths.append(checkpoint.path)
            if checkpoint.fenced:
                notes.append(f"{checkpoint.path.name} does not count: {checkpoint.fenced}")
    except LmscaleError as error:
        problems.append(str(error))
        paths = sorted(p for p in folder.checkpoints.glob("step-*") if p.suffix != ".tmp")
    for leftover in sorted(folder.checkpoints.glob("*.tmp")):
        notes.append(f"{leftover.name}: an unfinished save; it may be deleted")
    result = _checkpoints(sorted(paths), progress)
    for lines in (folder.metrics, folder.eval, *sorted((folder.path / "trace").glob("*.jsonl"))):
        try:
            for _ in read_lines(lines):
                pass
        except LmscaleError as error:
            problems.append(str(error))
    return VerifyResult("run", problems + result.problems, notes + result.notes)
