"""The paths in a run folder."""

import re
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT = re.compile(r"step-(\d{8,})-a(\d+)")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run (`train.run_dir`). Names only: nothing is read or written here."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved run file."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def eval(self) -> Path:
        """One JSON object per step, corpus and metric."""
        return self.path / "eval.jsonl"

    @property
    def layers(self) -> Path:
        """Norms by part of the model, one JSON object every log.every_steps steps (`log.layer_stats`)."""
        return self.path / "layers.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of step-*-a* folders."""
        return self.path / "checkpoints"

    @property
    def attempts(self) -> Path:
        """Folder of k.json files."""
        return self.path / "attempts"

    @property
    def events(self) -> Path:
        """Folder of START.jsonl files."""
        return self.path / "events"

    @property
    def tensorboard(self) -> Path:
        """Folder of event files."""
        return self.path / "tensorboard"

    @property
    def jobs(self) -> Path:
        """Folder of K.json, K.yaml, K.sh: what was submitted, its run file, its script."""
        return self.path / "jobs"

    @property
    def bad_nodes(self) -> Path:
        """One file per node that failed its check, or whose copies of the weights drifted, named after the host."""
        return self.path / "bad-nodes"

    @property
    def logs(self) -> Path:
        """Folder of START-rank-R.log and job-K.log files."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """The run as one HTML page."""
        return self.path / "report.html"

    @property
    def stop(self) -> Path:
        """While this file exists, nothing starts the run again by itself."""
        return self.path / "stop"

    @property
    def status(self) -> Path:
        """State, step and reason, replaced every 10 s while the run is alive (run_folder/status_file.py)."""
        return self.path / "status.json"

    def trace(self, rank: int) -> Path:
        """The samples that this rank trained on (`data.trace`)."""
        return self.path / "trace" / f"rank-{rank}.jsonl"

    def checkpoint(self, step: int, attempt: int) -> Path:
        """Folder of a published checkpoint."""
        return self.checkpoints / checkpoint_name(step, attempt)


def checkpoint_name(step: int, attempt: int) -> str:
    """step-00001234-a1: sorts by step up to 8 digits, and grows beyond."""
    return f"step-{step:08d}-a{attempt}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint folder's name, or None for any other name (.tmp included)."""
    match = _CHECKPOINT.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None
