"""One Slurm command, run with a time limit and a clean environment; its errors as text.

What Slurm's commands print about jobs, read into one shape. Pure.

The JSON of squeue changed with almost every version: states are texts before 23.11 and lists since,
numbers are objects {set, infinite, number} since 23.02, and an exit code is a wait status before 23.11.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.base.env import scrubbed
from lmscale.base.errors import ConfigError, Problem, RetryableError

# Slurm's own commands give up after 9 to 10 s without an answer (MessageTimeout, measured).
TIMEOUT_S = 10.0
# Twice, for a look at the newest job before a submit, is still within 15 s.
PING_TIMEOUT_S = 6.0
# sbatch is not given up lightly: it may have queued the job before its answer was lost.
SUBMIT_TIMEOUT_S = 30.0

# SQUEUE_PARTITION and its like are a user's habits: they would hide jobs, or ask before each scancel.
_HABIT = re.compile(r"(SQUEUE|SACCT|SINFO|SCANCEL|SCONTROL)_")
_DOWN = re.compile(
    r"Unable to contact slurm controller|Zero Bytes were transmitted|Socket timed out|Connection refused"
    r"|Connection timed out|in standby mode|Slurmctld\S* at \S+ is DOWN|Rate limit exceeded"
    r"|Failed while looking for jobs|Unexpected message received|Transport endpoint",
    re.IGNORECASE,
)
_CLOCKS = re.compile(r"(?:Expired|Rewound) credential", re.IGNORECASE)
_MUNGE = re.compile(
    r"Munge (?:encode|decode) failed[^\n]*|auth_g_\w+: [^\n]*|authentication error|Invalid credential",
    re.IGNORECASE,
)
_NO_CONF = re.compile(
    r"(?:cannot stat file|Unable to process configuration file|ClusterName needs to be specified"
    r"|Could not establish a configuration source|Unable to establish configuration source"
    r"|resolve_ctls_from_dns_srv)[^\n]*",
    re.IGNORECASE,
)
_VERSIONS = re.compile(r"Incompatible versions of client and server", re.IGNORECASE)


class SlurmUnavailable(RetryableError):
    """Slurm could not be asked. Nothing is known of any job: least of all that it has ended."""


@dataclass(frozen=True, slots=True)
class SlurmResult:
    """What a command said."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """The first telling line, without the name of the command."""
        for line in (*self.err.splitlines(), *self.out.splitlines()):
            told = re.sub(r"^\w+: (?:error: |fatal: )?", "", line).strip()
            if told:
                return told
        return f"exit code {self.code} without a message"


def ask(*argv: str, timeout_s: float = TIMEOUT_S) -> SlurmResult:
    """Run a command that only asks. Raises NoAnswer, or ConfigError where there is no Slurm."""
    env = {name: value for name, value in scrubbed(os.environ).items() if not _HABIT.match(name)}
    env |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    return _run(argv, timeout_s=timeout_s, env=env)


def sbatch(argv: Sequence[str], *, cwd: Path) -> SlurmResult:
    """Queue a script, or only try to (--test-only). The job inherits this process' environment, scrubbed."""
    limit = TIMEOUT_S if "--test-only" in argv else SUBMIT_TIMEOUT_S
    return _run(argv, timeout_s=limit, env=scrubbed(os.environ), cwd=cwd)


def ping() -> None:
    """Raise NoAnswer where no controller answers: in milliseconds where its machine refuses."""
    answer = ask("scontrol", "ping", timeout_s=PING_TIMEOUT_S)
    if not re.search(r"\bis UP\b", answer.out, re.IGNORECASE) and answer.code != 0:
        raise SlurmUnavailable(_down(answer.words))


def _run(
    argv: Sequence[str], *, timeout_s: float, env: dict[str, str], cwd: Path | None = None
) -> SlurmResult:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, env=env, cwd=cwd,
            check=False, start_new_session=True,  # a Ctrl-C must not end sbatch when the job is queued already
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ConfigError([_missing(argv[0], cwd)]) from error
    except PermissionError as error:
        fact = f"{argv[0]} may not be run here ({error.strerror})"
        raise ConfigError([Problem("cluster.kind", fact, "look at its permissions")]) from error
    except subprocess.TimeoutExpired as error:
        told = (error.stderr or b"").decode(errors="replace")
        _raise_for(argv, told)
        raise SlurmUnavailable(_hangs(argv, timeout_s)) from error
    answer = SlurmResult(
        tuple(argv), done.returncode, done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
    )  # fmt: skip
    if answer.code != 0:
        _raise_for(argv, answer.err)
    return answer


def _raise_for(argv: Sequence[str], err: str) -> None:
    """Raise where Slurm could not even be asked; other refusals are the caller's to judge."""
    if match := _NO_CONF.search(err):
        hint = "set SLURM_CONF to the site's slurm.conf, or submit from a login node of the cluster"
        raise ConfigError([Problem("cluster.kind", f"Slurm is not set up here: {match[0]}", hint)])
    if _CLOCKS.search(err):
        raise SlurmUnavailable(
            f"{argv[0]}: the clocks of this machine and of Slurm's controller differ by minutes\n"
            "  hint: set this machine's clock (chronyd or ntpd), then try again"
        )
    if match := _MUNGE.search(err):
        raise SlurmUnavailable(
            f"{argv[0]} was not authenticated: {match[0].strip()}\n"
            "  hint: munged must run here with the cluster's key: systemctl status munge"
        )
    if _VERSIONS.search(err):
        raise SlurmUnavailable(
            f"{argv[0]} and Slurm's controller have incompatible versions\n"
            "  hint: use the commands that the site installed, e.g. on a login node"
        )
    if match := _DOWN.search(err):
        raise SlurmUnavailable(_down(match[0]))


def _down(told: str) -> str:
    return (
        f"Slurm's controller does not answer ({told})\n"
        "  hint: nothing is lost: jobs keep running meanwhile; try again when `scontrol ping` says UP"
    )


def _hangs(argv: Sequence[str], timeout_s: float) -> str:
    if argv[0] == "sbatch" and "--test-only" not in argv:
        hint = "the job may have been queued all the same: look with `squeue --me` before you try again"
    else:
        hint = "the controller hangs or has too much to do: `scontrol ping`; try again later"
    return f"{argv[0]} did not answer within {timeout_s:.0f} s\n  hint: {hint}"


def _missing(program: str, cwd: Path | None) -> Problem:
    if cwd is not None and not cwd.is_dir():
        return Problem("", f"the working directory {cwd} is gone", "make it, or go elsewhere")
    hint = (
        "submit from a login node of the cluster, or install Slurm's client here (Debian, Ubuntu: "
        "apt-get install slurm-client) with the site's slurm.conf and munge key; "
        "without Slurm: cluster.kind=local"
    )
    return Problem("cluster.kind", f"no Slurm on this machine: there is no command {program}", hint)


# squeue -o, for versions without --json; only the name of a job may hold a bar.
SQUEUE_FORMAT = "%i|%T|%N|%r|%j"
SACCT_FIELDS = "JobID,State,ExitCode,Submit,NodeList,JobName"


class Unreadable(ValueError):
    """An answer that is no answer: nothing is known of any job."""


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """One job, or one task of an array, as one answer shows it."""

    job: str  # 17, 17_3 (of an array), 17+1 (of a heterogeneous job)
    states: tuple[str, ...]  # Slurm's words; several since 23.11: COMPLETED, COMPLETING
    reason: str = ""
    nodes: str = ""  # a host list
    status: tuple[int, int] | None = None  # exit code and signal of the batch script
    restarts: int | None = None  # by Slurm itself
    name: str = ""


def read_squeue_json(text: str) -> list[QueueEntry]:
    """`squeue --json`. Raises Unreadable for an answer with errors: its list of jobs is then empty.

    22.05 exits with 0 and an empty list when the controller is down; only `errors` shows it.
    """
    try:
        answer = json.loads(text)
        jobs, errors = answer["jobs"], answer.get("errors") or []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"squeue --json: {error}") from error
    if errors and not jobs:
        raise Unreadable(f"squeue --json: {_told(errors[0])}")
    try:
        return [_of_json(job) for job in jobs]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Unreadable(f"squeue --json has an unknown shape: {error!r}") from error


def read_squeue(text: str) -> list[QueueEntry]:
    """`squeue -h -o SQUEUE_FORMAT`. Raises Unreadable."""
    found = []
    for line in text.splitlines():
        job, *rest = line.split("|", 4)
        if len(rest) != 4 or not job[:1].isdigit():
            raise Unreadable(f"squeue: {line!r}")
        state, nodes, reason, name = (field.strip() for field in rest)
        found.append(QueueEntry(job.strip(), (state,), reason, nodes, name=name))
    return found


def read_sacct(text: str) -> list[QueueEntry]:
    """`sacct -D -X -n -P -o SACCT_FIELDS`: the newest incarnation of each job, with their number.

    Without -D, sacct shows only the newest; with it, a requeued job has one line an incarnation.
    Raises Unreadable.
    """
    lines: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        fields = line.split("|", SACCT_FIELDS.count(","))
        if len(fields) != len(SACCT_FIELDS.split(",")):
            raise Unreadable(f"sacct: {line!r}")
        if "." not in fields[0]:  # a step
            lines.setdefault(fields[0], []).append(fields)
    found = []
    for job, incarnations in lines.items():
        # Submit is ISO 8601, or Unknown; Python's sort is stable, and sacct lists them in order.
        newest = sorted(incarnations, key=lambda fields: fields[3])[-1]
        nodes = "" if newest[4].startswith("None") else newest[4]
        found.append(
            QueueEntry(
                job,
                (newest[1],),
                nodes=nodes,
                status=_pair(newest[2]),
                restarts=len(incarnations) - 1,
                name=newest[5],
            )
        )
    return found


def read_scontrol(text: str) -> list[QueueEntry]:
    """`scontrol show job -o`: a line a job, which has no JSON before 23.02."""
    found = []
    for line in text.splitlines():
        # Values may hold spaces and = (Command, Comment), so only these names are looked for.
        pairs = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
        if "JobId" not in pairs or "JobState" not in pairs:
            continue
        job = pairs["JobId"]
        if task := pairs.get("ArrayTaskId"):  # 3, or 2-5%1 of those that wait
            job = f"{pairs['ArrayJobId']}_{task if task.isdecimal() else f'[{task}]'}"
        elif "HetJobOffset" in pairs and "HetJobId" in pairs:
            job = f"{pairs['HetJobId']}+{pairs['HetJobOffset']}"
        restarts = pairs.get("Restarts", "")
        found.append(
            QueueEntry(
                job, (pairs["JobState"],), pairs.get("Reason", ""),
                "" if pairs.get("NodeList") == "(null)" else pairs.get("NodeList", ""),
                _pair(pairs.get("ExitCode", "")), int(restarts) if restarts.isdecimal() else None,
                pairs.get("JobName", ""),
            )
        )  # fmt: skip
    return found


def _of_json(job: Mapping[str, Any]) -> QueueEntry:
    state = job["job_state"]
    states = (state,) if isinstance(state, str) else tuple(map(str, state))
    if not states:
        raise ValueError(f"job {job['job_id']} has no state")
    told = str(job.get("state_description") or "")
    reason = str(job.get("state_reason") or "")
    # Slurm's own sentence, where it has one: it starts with the reason, or takes its place.
    if told and states[0] == "PENDING":
        reason = told if told.startswith(reason) else f"{reason}, {told}"
    return QueueEntry(
        _json_id(job), states, reason, str(job.get("nodes") or ""), _json_status(job.get("exit_code")),
        _number(job.get("restart_cnt")), str(job.get("name") or ""),
    )  # fmt: skip


def _json_id(job: Mapping[str, Any]) -> str:
    array, task = _number(job.get("array_job_id")), _number(job.get("array_task_id"))
    if array and task is not None:
        return f"{array}_{task}"
    if array and job.get("array_task_string"):
        return f"{array}_[{job['array_task_string']}]"
    if het := _number(job.get("het_job_id")):
        return f"{het}+{_number(job.get('het_job_offset')) or 0}"
    return str(int(job["job_id"]))


def _json_status(value: object) -> tuple[int, int] | None:
    if isinstance(value, Mapping) and "return_code" in value:  # since 23.11
        signal = value.get("signal")
        killed = _number(signal.get("id")) if isinstance(signal, Mapping) else None
        return _number(value["return_code"]) or 0, killed or 0
    status = _number(value)
    return None if status is None else (status >> 8, status & 0x7F)


def _number(value: object) -> int | None:
    """A number, bare before 23.02 and an object since."""
    if isinstance(value, Mapping):
        value = value.get("number") if value.get("set") and not value.get("infinite") else None
    return int(value) if isinstance(value, int | float) else None


def _pair(text: str) -> tuple[int, int] | None:
    """`75:0`: exit code and signal."""
    code, _, signal = text.partition(":")
    return (int(code), int(signal)) if code.isdecimal() and signal.isdecimal() else None


def _told(error: object) -> str:
    if isinstance(error, Mapping):
        return str(error.get("description") or error.get("error") or dict(error))
    return str(error)
