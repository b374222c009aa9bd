"""What Slurm's commands print about jobs, read into one shape. Pure.

The JSON of squeue changed with almost every version: states are texts before 23.11 and lists since,
numbers are objects {set, infinite, number} since 23.02, and an exit code is a wait status before 23.11.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# squeue -o, for versions without --json; only the name of a job may hold a bar.
SQUEUE_FORMAT = "%i|%T|%N|%r|%j"
SACCT_FIELDS = "JobID,State,ExitCode,Submit,NodeList,JobName"


class Unreadable(ValueError):
    """An answer that is no answer: nothing is known of any job."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One job, or one task of an array, as one answer shows it."""

    job: str  # 17, 17_3 (of an array), 17+1 (of a heterogeneous job)
    states: tuple[str, ...]  # Slurm's words; several since 23.11: COMPLETED, COMPLETING
    reason: str = ""
    nodes: str = ""  # a host list
    status: tuple[int, int] | None = None  # exit code and signal of the batch script
    restarts: int | None = None  # by Slurm itself
    name: str = ""


def read_squeue_json(text: str) -> list[Seen]:
    """`squeue --json`. Raises Unreadable for an answer with errors: its list of jobs is then empty.

    22.05 exits with 0 and an empty list when the controller is down; only `errors` tells.
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


def read_squeue(text: str) -> list[Seen]:
    """`squeue -h -o SQUEUE_FORMAT`. Raises Unreadable."""
    found = []
    for line in text.splitlines():
        job, *rest = line.split("|", 4)
        if len(rest) != 4 or not job[:1].isdigit():
            raise Unreadable(f"squeue: {line!r}")
        state, nodes, reason, name = (field.strip() for field in rest)
        found.append(Seen(job.strip(), (state,), reason, nodes, name=name))
    return found


def read_sacct(text: str) -> list[Seen]:
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
            Seen(
                job,
                (newest[1],),
                nodes=nodes,
                status=_pair(newest[2]),
                restarts=len(incarnations) - 1,
                name=newest[5],
            )
        )
    return found


def read_scontrol(text: str) -> list[Seen]:
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
            Seen(
                job, (pairs["JobState"],), pairs.get("Reason", ""),
                "" if pairs.get("NodeList") == "(null)" else pairs.get("NodeList", ""),
                _pair(pairs.get("ExitCode", "")), int(restarts) if restarts.isdecimal() else None,
                pairs.get("JobName", ""),
            )
        )  # fmt: skip
    return found


def _of_json(job: Mapping[str, Any]) -> Seen:
    state = job["job_state"]
    states = (state,) if isinstance(state, str) else tuple(map(str, state))
    if not states:
        raise ValueError(f"job {job['job_id']} has no state")
    told = str(job.get("state_description") or "")
    reason = str(job.get("state_reason") or "")
    # Slurm's own sentence, where it has one: it starts with the reason, or takes its place.
    if told and states[0] == "PENDING":
        reason = told if told.startswith(reason) else f"{reason}, {told}"
    return Seen(
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
