"""Which run folder does the user mean?"""

from pathlib import Path

from lmscale.errors import ConfigError, Problem
from lmscale.run.folder import RunFolder


def is_run_folder(path: Path) -> bool:
    """Whether a run has been started, or submitted, in this folder."""
    folder = RunFolder(path)
    return folder.events.is_dir() or folder.config.is_file() or folder.jobs.is_dir()


def find_run_folder(run: str) -> RunFolder:
    """The run folder that a user means: its path, or its name in runs/. Raises ConfigError."""
    for path in (Path(run), Path("runs") / run):
        if is_run_folder(path):
            return RunFolder(path.absolute())
    hint = "give the folder that holds config.yaml, jobs/ and events/ (train.run_dir)"
    raise ConfigError([Problem("", f"{run} is no run folder, and neither is runs/{run}", hint)])
