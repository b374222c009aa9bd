"""RUN/jobs/K.json: what was submitted where. All that a later `status`, `logs` or `stop` goes by."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lmscale.errors import ConfigError, Problem
from lmscale.run.durable import replace_file, storage_errors
from lmscale.run.folder import RunFolder

_NAME = re.compile(r"([1-9]\d*)\.(?:json|yaml|sh|chain|tries)")


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One submission of a run."""

    number: int  # from 1
    kind: str  # local | mpi | slurm: cluster.kind
    job: str  # the cluster's name for it: a job id, or pid of the supervisor that stands for it
    host: str  # where it was submitted
    time: float
    nodes: int
    min_nodes: int
    ranks_per_node: int
    facts: Mapping[str, Any] = field(default_factory=dict)  # of its kind: ticks of a pid, ...


def next_number(folder: RunFolder) -> int:
    """The number of the next submission, beyond every file of an earlier one."""
    names = folder.jobs.iterdir() if folder.jobs.is_dir() else ()
    return 1 + max((int(m[1]) for m in (_NAME.fullmatch(p.name) for p in names) if m), default=0)


def write_record(folder: RunFolder, record: JobRecord) -> None:
    """Write or replace a record."""
    path = folder.jobs / f"{record.number}.json"
    with storage_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(asdict(record), indent=1) + "\n").encode())


def read_records(folder: RunFolder) -> list[JobRecord]:
    """All submissions of a run, oldest first. Raises ConfigError for a file that makes no sense."""
    found = []
    for path in folder.jobs.glob("*.json") if folder.jobs.is_dir() else ():
        if not _NAME.fullmatch(path.name):
            continue
        try:
            found.append(JobRecord(**json.loads(path.read_text())))
        except (ValueError, TypeError) as error:
            hint = "restore the file, or remove it if the job has ended"
            raise ConfigError(
                [Problem("", f"{path} is no record of a job ({error})", hint)]
            ) from error
    return sorted(found, key=lambda record: record.number)


def newest_record(folder: RunFolder) -> JobRecord | None:
    """The newest submission, or None for a run that was only started by hand."""
    records = read_records(folder)
    return records[-1] if records else None
