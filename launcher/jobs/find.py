"""Which run folder does the user mean?"""

from pathlib import Path

from lmscale.errors import ConfigError, Problem
from lmscale.run.folder import RunFolder


def find_run_folder(run: str) -> RunFolder:
    """The run folder that a user means: its path, or its name in runs/. Raises ConfigError."""
    for path in (Path(run), Path("runs") / run):
        folder = RunFolder(path.absolute())
        if folder.events.is_dir() or folder.jobs.is_dir() or folder.config.is_file():
            return folder
    hint = "give the folder that holds config.yaml, jobs/ and events/ (train.run_dir)"
    raise ConfigError([Problem("", f"{run} is no run folder, and neither is runs/{run}", hint)])
