"""`lmscale resume RUN`: submit a run again that was stopped, has failed or was cancelled."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmscale.base.errors import ConfigError, Problem, UsageError
from lmscale.checks.resume_checks import resume_problems
from lmscale.config.run_file import load
from lmscale.config.schema import RunConfig
from lmscale.run_folder.bad_nodes import read_bad_nodes
from lmscale.run_folder.checkpoints import CheckpointEntry, newest_valid
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.jobs.run_facts import find_run_folder
from lmscale_launcher.jobs.submit import hand_over, refuse_a_live_run, run_name

_JOB_CONFIG = re.compile(r"([1-9]\d*)\.yaml")


def resume(run: str, overrides: Sequence[str], *, dry_run: bool, as_json: bool) -> int:
    """Resume from the newest checkpoint, as a new job. Returns 0, or the exit code of a job that ended at once."""
    folder = find_run_folder(run)
    refuse_a_live_run(folder)
    cfg = _config(folder, overrides)
    found = newest_valid(folder)
    if found is not None:
        _check(cfg, folder, found)
    notes = [
        _from_where(found),
        *_bad_nodes(folder, excludes=cluster_of(cfg.cluster.kind).excludes_bad_nodes),
    ]
    return hand_over(cfg, dry_run=dry_run, as_json=as_json, notes=notes)


def newest_config(folder: RunFolder) -> Path:
    """The run file of the newest submission; config.yaml of a run that was only started by hand."""
    names = folder.jobs.iterdir() if folder.jobs.is_dir() else ()
    numbers = [
        int(match[1]) for match in (_JOB_CONFIG.fullmatch(path.name) for path in names) if match
    ]
    path = folder.jobs / f"{max(numbers)}.yaml" if numbers else folder.config
    if not path.is_file():
        hint = "start it with its run file: lmscale submit RUN.yaml"
        raise ConfigError(
            [Problem("", f"{folder.path} has no run file, {path.name} is missing", hint)]
        )
    return path


def _config(folder: RunFolder, overrides: Sequence[str]) -> RunConfig:
    if any(text.startswith("train.run_dir=") for text in overrides):
        raise UsageError("a run resumes in its own folder: leave train.run_dir out")
    # JSON is YAML. The folder may have been moved or copied since its run file was written.
    here = f"train.run_dir={json.dumps(str(folder.path))}"
    path = newest_config(folder)
    cfg = load(path, [*overrides, here])
    if cfg.train.resume == "never":  # meant for the first start: now there are checkpoints
        cfg = load(path, [*overrides, here, "train.resume=auto"])
    return cfg


def _check(cfg: RunConfig, folder: RunFolder, found: CheckpointEntry) -> None:
    """Say here what the ranks would refuse, or do nothing about, in their first seconds."""
    if problems := resume_problems(cfg, found):
        raise ConfigError(problems)
    if cfg.train.stop_at is not None and found.step >= cfg.train.stop_at:
        fact = f"{cfg.train.stop_at}, but the run is at step {found.step} already"
        hint = f"lmscale resume {run_name(folder)} train.stop_at=null"
        raise ConfigError([Problem("train.stop_at", fact, hint)])


def _from_where(found: CheckpointEntry | None) -> str:
    if found is None:
        return "no checkpoint exists yet: it starts from the beginning"
    return f"resuming from step {found.step} ({found.path.name})"


def _bad_nodes(folder: RunFolder, *, excludes: bool) -> Iterator[str]:
    for bad in read_bad_nodes(folder):
        if excludes:
            yield f"excluded: {bad.host} ({bad.why}); to use it again, remove {bad.path}"
        else:
            yield (
                f"warning: {bad.host} is marked bad ({bad.why}), but this cluster kind cannot exclude "
                f"nodes. Delete {bad.path} when it is repaired."
            )
