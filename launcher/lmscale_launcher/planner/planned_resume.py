"""The checkpoint from which the next start of a run resumes: its step, position and batch sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmscale.base.errors import ConfigError, Problem
from lmscale.checks.resume_checks import identity_problem, read_checkpoint
from lmscale.config.schema import RunConfig
from lmscale.run_folder.checkpoints import newest_valid
from lmscale.run_folder.paths import RunFolder

if TYPE_CHECKING:  # it loads numpy
    from lmscale.corpus.schedule import Phase


_KEY = "train.global_batch_size"


@dataclass(frozen=True, slots=True)
class PlannedResume:
    """The state from which the next start resumes; step 0 for a new run."""

    streams: int  # of the sample order: a run keeps the number of its first start
    step: int = 0
    position: int = 0  # samples consumed
    first_batch: int = 0  # global batch size of step 1
    changes: tuple[tuple[int, int, int], ...] = ()  # (step, position, global batch size from there)

    @property
    def phases(self) -> "tuple[Phase, ...]":
        """The global batch sizes of the whole run, past and future."""
        from lmscale.corpus.schedule import Phase

        first = Phase(self.first_batch)
        later = (Phase(batch, step, position) for step, position, batch in self.changes)
        return (first, *later)


def resume_point(cfg: RunConfig) -> PlannedResume:
    """The resume point of the next start. Raises ConfigError for a batch size that `lmscale train` refuses."""
    batch = cfg.train.global_batch_size
    if (path := _source(cfg)) is None:
        return PlannedResume(cfg.data.streams or batch, first_batch=batch)
    body = read_checkpoint(path)
    identity, state = body.get("identity", {}), body.get("state", {}).get("train", {})
    step = int(body.get("step", 0))
    before = int(identity.get(_KEY, batch))
    changes = _journaled(state.get("journal", ()))
    first = changes[0][3] if changes else before
    later = [change[:3] for change in changes]
    position = int(state.get("position", step * before))
    if before != batch:
        if _KEY not in cfg.train.allow_change:
            problem = identity_problem(_KEY, now=batch, before=before, checkpoint=str(path))
            raise ConfigError([problem])
        later.append((step, position, batch))
    first_streams = identity.get("data.streams")
    streams = first_streams if isinstance(first_streams, int) else cfg.data.streams or first
    return PlannedResume(streams, step, position, first, tuple(later))


def _source(cfg: RunConfig) -> Path | None:
    """The checkpoint from which a start would resume; of another run where train.resume names one."""
    newest = newest_valid(RunFolder(Path(cfg.train.run_dir)))
    if newest is not None:
        return newest.path
    if cfg.train.resume in ("auto", "never"):
        return None
    path = Path(cfg.train.resume)
    if not path.is_dir():
        fact = f"{path} is not a checkpoint, and neither auto nor never"
        hint = "name a folder RUN/checkpoints/step-*, or leave the key out"
        raise ConfigError([Problem("train.resume", fact, hint)])
    return path


def _journaled(journal: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int, int]]:
    """(step, position, new size, old size) of each change of the global batch size."""
    return [
        (int(entry["step"]), int(entry["position"]), int(entry["now"]), int(entry["before"]))
        for entry in journal
        if entry["key"] == _KEY
    ]
