"""Jobs that are background processes of a host: started, distinguished from later processes, ended."""

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from typing_extensions import override

from lmscale.base.env import scrubbed
from lmscale.base.errors import ConfigError, Problem
from lmscale.base.fs import storage_errors
from lmscale.base.proc import is_alive, started_ticks, this_host
from lmscale.base.records import readable_lines
from lmscale.run_folder.liveness import STALE_S
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.base import Cluster, JobState
from lmscale_launcher.clusters.job import JobPlan, JobRecord
from lmscale_launcher.jobs.interrupts import ends_quietly

# Errors of the ranks appear after they have imported torch, those of the supervisor at once.
_WATCH_S = 10.0
_POLL_S = 0.05


class BackgroundCluster(Cluster):
    """What kinds share whose job is a background process: its pid names the job, nothing is ever pending."""

    @override
    def states(self, jobs: Sequence[tuple[RunFolder, JobRecord]]) -> list[JobState]:
        return [state(folder, record) for folder, record in jobs]

    @override
    def cancel(self, folder: RunFolder, record: JobRecord) -> None:
        kill(record)

    @override
    def withdraw(self, folder: RunFolder, record: JobRecord) -> bool:
        return False


def preview(plan: JobPlan, command: Sequence[str]) -> str:
    """What `start` does, as a person would type it."""
    given = [f"{name}={shlex.quote(text)}" for name, text in _added(plan).items()]
    line = " ".join(["setsid", "env", *given, shlex.join(command)])
    return (
        f"cd {shlex.quote(str(plan.workdir))}\n"
        f"{line} </dev/null >>{shlex.quote(str(plan.log))} 2>&1 &\n"
    )


def start(plan: JobPlan, command: Sequence[str], env: Mapping[str, str]) -> JobRecord:
    """Start a supervisor in the background, and check for some seconds whether it stays."""
    with storage_errors(f"writing {plan.log}"):
        plan.log.parent.mkdir(parents=True, exist_ok=True)
        log = open(plan.log, "ab")  # noqa: SIM115 closed below
    with log:
        try:
            process = subprocess.Popen(
                command, cwd=plan.workdir, env={**scrubbed(env), **_added(plan)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            plan.log.unlink()
            fact = f"cannot start {command[0]}: {error.strerror}"
            raise ConfigError([Problem("", fact, "install it, or fix its permissions")]) from error
    ticks, begun = started_ticks(process.pid), time.time()
    with ends_quietly():  # Ctrl-C ends the looking: the job is there, and its record must be too
        _watch(process, plan.folder, begun)
    facts: dict[str, Any] = {"host": this_host(), "ticks": ticks}
    if process.returncode is None:
        process.returncode = 0  # it outlives this process on purpose: no ResourceWarning
    else:
        facts["code"] = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return JobRecord(
        number=plan.number,
        kind=plan.cluster.kind,
        job=str(process.pid),
        host=socket.gethostname(),
        time=begun,
        nodes=plan.nodes,
        min_nodes=plan.min_nodes,
        ranks_per_node=plan.ranks_per_node,
        facts=facts,
    )


def state(folder: RunFolder, record: JobRecord) -> JobState:
    """The state of the job. On another host only its heartbeat shows it, and silence makes it unknown."""
    own, heard_at = list(_own_events(folder, record)), _heard_at(folder, record)
    restarts = max(0, sum(event["kind"] == "start" for event in own) - 1)
    ended = next((event for event in reversed(own) if event["kind"] == "exit"), None)
    hosts = tuple(record.facts.get("hosts", (record.host,)))
    code = record.facts.get("code", ended["code"] if ended else None)
    here = record.facts.get("host") == this_host()
    if code is None and here and is_alive(int(record.job), record.facts.get("ticks")):
        return JobState("running", hosts=hosts, restarts=restarts)
    if code is not None or here:
        reason = str(ended["reason"]) if ended else "" if code is not None else "killed"
        return JobState("ended", reason, hosts, code, restarts)
    silent_s = time.time() - (heard_at or record.time)
    if heard_at and silent_s < STALE_S:
        return JobState("running", hosts=hosts, restarts=restarts)
    reason = f"{record.host} has written no heartbeat for {silent_s:.0f} s; look there"
    return JobState("unknown", reason, hosts, None, restarts)


def kill(record: JobRecord) -> None:
    """End the supervisor, and with it all that it has started, without saving."""
    if record.facts.get("host") != this_host():
        fact = f"the job runs on {record.host}, and only there it can be killed"
        hint = f"`lmscale stop --now` on {record.host}, or `lmscale stop`, which works from here"
        raise ConfigError([Problem("", fact, hint)])
    if not is_alive(int(record.job), record.facts.get("ticks")):
        return
    signal_to(int(record.job), signal.SIGKILL)


def signal_to(pid: int, number: signal.Signals) -> None:
    """Send a signal; nothing where the process has ended by itself. Raises ConfigError if it is another user's."""
    try:
        os.kill(pid, number)
    except PermissionError as error:
        fact = f"pid {pid} belongs to another user"
        raise ConfigError([Problem("", fact, "its owner can stop it")]) from error
    except ProcessLookupError:
        pass


def _added(plan: JobPlan) -> dict[str, str]:
    """As a scheduler's script does: the name of this start, and that a person has made it."""
    name = f"{plan.cluster.kind}-{plan.number}"
    return {"LMSCALE_START": name, "LMSCALE_FRESH": "1", **plan.env}


def _files(folder: RunFolder, since: float) -> Iterator[Any]:
    for path in folder.events.glob("*.jsonl") if folder.events.is_dir() else ():
        if (
            path.stat().st_mtime >= since - STALE_S
        ):  # clocks of a file server and its clients differ
            yield path


def _own_events(folder: RunFolder, record: JobRecord) -> Iterator[dict[str, Any]]:
    who = (record.facts.get("host"), int(record.job))
    for path in sorted(_files(folder, record.time), key=lambda one: float(one.stat().st_mtime)):
        for event in readable_lines(path):
            if (event["host"], event["pid"]) == who and event["time"] >= record.time - STALE_S:
                yield event


def _heard_at(folder: RunFolder, record: JobRecord) -> float | None:
    who = (record.facts.get("host"), int(record.job))
    beats = [
        float(path.stat().st_mtime)
        for path in _files(folder, record.time)
        if any((event["host"], event["pid"]) == who for event in readable_lines(path))
    ]
    return max(beats, default=None)


def _watch(process: subprocess.Popen[bytes], folder: RunFolder, begun: float) -> None:
    """Until it trains, ends, or has stayed for some seconds."""
    until = time.monotonic() + _WATCH_S
    while process.poll() is None and time.monotonic() < until and not _trains(folder, begun):
        time.sleep(_POLL_S)


def _trains(folder: RunFolder, since: float) -> bool:
    """Whether ranks have met and loaded: most that can go wrong at once has not."""
    return any(
        event["kind"] == "attempt" and event["time"] >= since
        for path in _files(folder, since)
        for event in readable_lines(path)
    )
