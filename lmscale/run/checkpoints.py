"""Which checkpoints of a run folder count, newest first."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lmscale.errors import CheckpointError
from lmscale.run.attempts import Fence, fence
from lmscale.run.durable import storage_error
from lmscale.run.folder import RunFolder, parse_checkpoint_name
from lmscale.run.manifest import damage


@dataclass(frozen=True, slots=True)
class Found:
    """One published checkpoint folder and what is known against it."""

    step: int
    attempt: int
    path: Path
    fenced: str = ""  # which attempt overtook it
    damaged: tuple[str, ...] = ()  # proofs of damage

    @property
    def valid(self) -> bool:
        """Whether the run may go on from it."""
        return not self.fenced and not self.damaged

    @property
    def reason(self) -> str:
        """Why it does not count; empty when it does."""
        return self.fenced or "; ".join(self.damaged)


def listing(folder: RunFolder, *, deep: bool = False, ignoring: int | None = None) -> list[Found]:
    """All published checkpoints, highest step first, each judged by the fence and its manifest.

    `deep` reads every byte. `ignoring` leaves out one attempt's say: how that attempt itself sees
    whether it went on from the newest. Not-yet-published folders (.tmp) are not listed.
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
        found.append(Found(*parsed, folder.checkpoints / name, why, problems))
    return sorted(found, key=lambda one: (one.step, one.attempt), reverse=True)


def newest_valid(folder: RunFolder, *, damaged: Collection[Path] = ()) -> Found | None:
    """The checkpoint to go on from; None for a run that has never saved one.

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
            f"{folder.checkpoints}: the run went on from step {reached} before, but none of its "
            "checkpoints is left; restore one, or start in another train.run_dir"
        )
    return None


def reason_to_reload(
    folder: RunFolder, attempt: int, *, loaded: Path | None, damaged: Collection[Path] = ()
) -> str:
    """What attempt k, having settled, must check once more; empty when it may go on.

    An older attempt may have published, or deleted, between this one's listing and its settling.
    Then this one settles None and loads anew. `loaded`: None when it started from step 0.
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
    return f"overtaken: attempt {by.number} went on from step {by.from_step}" if by else ""


def _unnamed(path: Path) -> Found:
    return Found(-1, 0, path, damaged=(f"{path}: not a checkpoint's name (step-00000010-a1)",))


def _names(folder: RunFolder) -> list[str]:
    try:
        return os.listdir(folder.checkpoints)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(f"listing {folder.checkpoints}", error) from error
