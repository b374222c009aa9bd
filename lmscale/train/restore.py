"""A trained model from a checkpoint, for verbs that use it and do not train."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.checkpoint.load import read_body
from lmscale.config.run import RunConfig
from lmscale.errors import CheckpointError, ConfigError, Problem, UsageError
from lmscale.run.checkpoints import newest_valid
from lmscale.run.folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """A checkpoint, the run file it was trained with, and its manifest's body."""

    path: Path
    step: int
    cfg: RunConfig
    body: Mapping[str, Any]

    @property
    def run_dir(self) -> Path:
        """The run folder, where the checkpoint stands in one."""
        return self.path.parent.parent


def check_tokenizer(trained: Trained, fingerprint: str) -> None:
    """Raise ConfigError where a tokenizer is not the one of the checkpoint: its ids would mean other texts."""
    wanted = trained.body.get("identity", {}).get("data.tokenizer", fingerprint)
    if fingerprint != wanted:
        fact = (
            f"the tokenizer found now ({fingerprint[:12]}) is not the one that {trained.path} was trained "
            f"with ({wanted[:12]})"
        )
        corpus = trained.cfg.data.corpora[0].path
        raise ConfigError([Problem("data.tokenizer", fact, f"restore the corpus {corpus}")])


def find_trained(path: Path) -> Trained:
    """A checkpoint folder, or the newest valid checkpoint of a run folder. Raises UsageError, CheckpointError."""
    if not path.is_dir():
        raise UsageError(
            f"{path} is not a folder; give a run folder or one of its checkpoints/step-*"
        )
    if (path / "checkpoints").is_dir():
        found = newest_valid(RunFolder(path))
        if found is None:
            raise CheckpointError(
                f"{path} holds no valid checkpoint; look at it with `lmscale verify {path}`"
            )
        path = found.path
    body = read_body(path)
    return Trained(path, int(body["step"]), RunConfig.model_validate(body["config"]), body)
