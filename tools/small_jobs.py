"""Small runs of the real command, as the tests start them, kept in a folder so that each is made once."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.jobs import LMSCALE, Job, clean_env, lmscale, prepare_corpus

ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {"kind": "fsdp"},
    "ddp": {"kind": "ddp"},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
}


class SharedJobs:
    """A corpus and finished runs in one folder; what is there from an earlier call is used again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = folder / "small"
        if not (self.corpus / "manifest.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            prepare_corpus(folder)

    def finished(self, name: str, run: dict[str, Any], *overrides: str) -> Job:
        """The job `name`, run to its end (or to train.stop_at) in one go."""
        job, mark = Job(self.folder / name), self.folder / name / "done.json"
        wanted = json.dumps([run, overrides])
        if not mark.exists() or mark.read_text() != wanted:
            shutil.rmtree(job.folder, ignore_errors=True)
            job.folder.mkdir(parents=True)
            job.write(run)
            print(f"making {name}", flush=True)
            _must("train", "run.yaml", *overrides, cwd=job.folder)
            mark.write_text(wanted)
        return job


@dataclass(frozen=True)
class Started:
    """A start of a job, its output in a file: a pipe would have no reader while it is killed."""

    process: "subprocess.Popen[bytes]"
    number: int
    log: Path
    since: float


def start(job: Job, *overrides: str) -> Started:
    """`lmscale train` in the background, in a session of its own as from a shell."""
    number = len(list(job.folder.glob("start-*.log"))) + 1
    log = job.folder / f"start-{number}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(LMSCALE), "train", "run.yaml", *overrides], cwd=job.folder, env=clean_env(),
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Started(process, number, log, time.monotonic())


def plan_rows(job: Job, steps: int) -> dict[int, dict[str, Any]]:
    """What `lmscale plan --data` says that the run will read, by position."""
    done = _must("plan", "run.yaml", "--data", "--steps", f"1:{steps}", "--json", cwd=job.folder)
    rows = [json.loads(line) for line in done.splitlines()]
    planned = {row["position"]: row for row in rows}
    assert len(planned) == len(rows), "the plan has a position twice"
    return planned


def _must(*argv: str | Path, cwd: Path) -> str:
    done = lmscale(*argv, cwd=cwd, timeout=300)
    if done.returncode != 0:
        raise SystemExit(
            f"lmscale {' '.join(map(str, argv))}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout
