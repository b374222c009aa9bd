"""`lmscale submit RUN.yaml`: check everything that can be checked here, then start or queue the job."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmscale.base.errors import ConfigError, ExitCode, Problem
from lmscale.base.fs import create_exclusively, lock_folder, storage_errors
from lmscale.checks.corpus_checks import missing_corpora
from lmscale.checks.resume_checks import finished_message, finished_step
from lmscale.config.run_file import dump, load
from lmscale.config.schema import RunConfig
from lmscale.run_folder.liveness import live, refusal, wait_for_silence
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.base import Cluster, JobState
from lmscale_launcher.clusters.job import JobPlan, JobRecord
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.jobs.interrupts import uninterrupted
from lmscale_launcher.jobs.job_plan import (
    newest_record,
    next_number,
    plan_job,
    unstaged,
    write_record,
)
from lmscale_launcher.jobs.run_state import code_in_words

_TAIL_LINES = 20


def submit(source: str, overrides: Sequence[str], *, dry_run: bool, as_json: bool) -> int:
    """Start or queue a run. Returns 0, or the exit code of a job that has ended within seconds."""
    return hand_over(load(source, overrides), dry_run=dry_run, as_json=as_json)


def hand_over(cfg: RunConfig, *, dry_run: bool, as_json: bool, notes: Sequence[str] = ()) -> int:
    """Submit a loaded run. `notes` are printed first."""
    say = Say(as_json)
    folder = RunFolder(Path(cfg.train.run_dir))
    if found := list(missing_corpora(cfg)):
        raise ConfigError(found)
    plan = plan_job(cfg, number=next_number(folder), cwd=Path.cwd())
    refuse_a_live_run(folder)
    if (step := finished_step(cfg, folder)) is not None:
        say.lines(finished_message(folder, step))
        say.result({"run": str(folder.path), "finished": step})
        return ExitCode.DONE
    say.lines(*notes, *(f"note: {one.path}: {one.fact}; {one.hint}" for one in unstaged(cfg)))
    cluster = cluster_of(cfg.cluster.kind)
    if dry_run:
        return _preview(plan, cluster, say)
    with _submit_lock(folder):
        refuse_a_live_run(folder)
        plan = replace(plan, number=next_number(folder))
        with _in_place(plan, dump(cfg)), uninterrupted(_explain_wait(say)):
            record = cluster.submit(plan)
            write_record(folder, record)
    (state,) = cluster.states([(folder, record)])
    return _tell(plan, record, state, say)


def refuse_a_live_run(folder: RunFolder) -> None:
    """Raise ConfigError where a run trains in the folder, or its newest job has not ended."""
    record = newest_record(folder)
    state = None
    if record is not None:
        (state,) = cluster_of(record.kind).states([(folder, record)])
        if state.standing in ("pending", "running"):
            reason = f" ({state.reason})" if state.reason else ""
            fact = f"{folder.path}: {in_words(record)} is {state.standing}{reason}"
            if (other := live(folder)) is not None:
                attempt = (
                    f"attempt {other.attempt}" if other.attempt else "before its first attempt"
                )
                fact += f", pid {other.pid} on {other.host}, {attempt}"
            hint = f"wait for it, end it with `lmscale stop {run_name(folder)}`, or choose another train.run_dir"
            raise ConfigError([Problem("train.run_dir", fact, hint)])
    other = live(folder)
    if other is not None and other.here:
        raise refusal(folder, other)
    # Where the scheduler confirms the end, attempts fence off processes that it has lost.
    confirmed = (
        record is not None
        and state is not None
        and state.standing == "ended"
        and cluster_of(record.kind).confirms_job_end
    )
    if not confirmed:
        wait_for_silence(folder)


@dataclass(frozen=True, slots=True)
class Say:
    """Words for people, or one JSON object for programs with the words on standard error."""

    as_json: bool

    def lines(self, *lines: str) -> None:
        """Say something, line by line."""
        stream = sys.stderr if self.as_json else sys.stdout
        for line in lines:
            stream.write(line + "\n")
        stream.flush()

    def result(self, body: dict[str, Any]) -> None:
        """What came of it, for programs."""
        if self.as_json:
            sys.stdout.write(json.dumps(body) + "\n")


def in_words(record: JobRecord) -> str:
    """A job by its kind and name."""
    host = record.host.partition("/")[0]
    return f"job {record.number} ({record.kind} {record.job}, submitted on {host})"


def run_name(folder: RunFolder) -> str:
    """The shortest words that name a run folder from here, quoted for a shell."""
    path = folder.path
    if path.parent == Path.cwd() / "runs":
        return shlex.quote(path.name)
    with suppress(ValueError):
        return shlex.quote(str(path.relative_to(Path.cwd())))
    return shlex.quote(str(path))


def _explain_wait(say: Say) -> Callable[[], None]:
    """A job that is started but not recorded would be unknown to every verb."""
    return lambda: say.lines("Ctrl-C received; waiting until the job is recorded")


def _preview(plan: JobPlan, cluster: Cluster, say: Say) -> int:
    text = cluster.preview(plan)
    if say.as_json:
        facts = {"run": str(plan.run_dir), "number": plan.number, "kind": plan.cluster.kind}
        say.result({**facts, "dry_run": True, "config": str(plan.config), "preview": text})
    else:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stderr.write(f"nothing was written or started; {plan.config} would be the run file\n")
    return ExitCode.DONE


@contextmanager
def _submit_lock(folder: RunFolder) -> Iterator[None]:
    """Of two simultaneous submissions of a run, the second finds the job of the first.

    On a file system without locks a warning is logged, and the exclusive creation of K.yaml decides.
    """
    path = folder.jobs / ".lock"
    with storage_errors(f"locking {path}"):
        lock = lock_folder(path)
    with lock:
        yield


@contextmanager
def _in_place(plan: JobPlan, config: str) -> Iterator[None]:
    """The job's run file is there and RUN/stop is not; as it was before where submitting fails."""
    stop = plan.folder.stop
    with storage_errors(f"writing {plan.config}"):
        # Exclusively: without working locks two submits must not become one job.
        create_exclusively(plan.config, config.encode())
        stopped = stop.read_bytes() if stop.exists() else None
        stop.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        if stopped is not None:
            stop.write_bytes(stopped)
        for path in (plan.config, plan.script, plan.library):
            path.unlink(missing_ok=True)
        (plan.folder.jobs / ".lock").unlink(missing_ok=True)
        for path in (plan.folder.jobs, plan.folder.logs, plan.run_dir):
            with suppress(OSError):  # it holds something: it is not ours
                path.rmdir()
        raise


def _tell(plan: JobPlan, record: JobRecord, state: JobState, say: Say) -> int:
    run, code = run_name(plan.folder), int(ExitCode.DONE)
    said = str(record.facts.get("said", ""))  # a site's own words, e.g. of its submit plugin
    say.lines(*(f"{record.kind} reports: {line}" for line in said.splitlines()))
    if state.standing == "ended":
        code = state.code if state.code is not None else int(ExitCode.RETRY)
        say.lines(*_tail(plan.log))
        ended = code_in_words(code) if state.code is not None else state.reason
        say.lines(f"{in_words(record)} of {run} has ended: {ended}")
    else:
        reason = f" ({state.reason})" if state.reason else ""
        say.lines(
            f"{in_words(record)}: {plan.in_words()}",
            f"{state.standing}{reason}; its log: {plan.log}",
            f"  lmscale status {run}",
            f"  lmscale logs {run} -f",
            f"  lmscale stop {run}",
        )
    say.result(
        {
            "run": str(plan.run_dir),
            "number": record.number,
            "kind": record.kind,
            "job": record.job,
            "nodes": record.nodes,
            "min_nodes": record.min_nodes,
            "ranks_per_node": record.ranks_per_node,
            "config": str(plan.config),
            "log": str(plan.log),
            "state": state.standing,
            "reason": state.reason,
            "said": said,
            "code": state.code,
        }
    )
    return code


def _tail(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    except OSError as error:
        return [f"no log: {error}"]
