"""What a cluster's partitions and nodes can give, and what a plan asks for beyond it. Pure.

Before a job is queued, and in its first seconds: what can never run is reported at once.
"""

import getpass
import time
from collections.abc import Callable

from lmscale.base.errors import ConfigError, Problem
from lmscale_launcher.clusters.job import JobPlan
from lmscale_launcher.slurm import (
    query as commands,
)
from lmscale_launcher.slurm import (
    slurm_messages as reasons,
)
from lmscale_launcher.slurm import (
    slurm_messages as refused,
)
from lmscale_launcher.slurm.partitions import (
    SINFO_FORMAT,
    ResourceRequest,
    SlurmPartition,
    chosen,
    must_wait,
    names,
    problems,
    read_partitions,
    request_of,
)
from lmscale_launcher.slurm.query import (
    SQUEUE_FORMAT,
    QueueEntry,
    SlurmResult,
    SlurmUnavailable,
    Unreadable,
    ask,
    read_squeue,
)
from lmscale_launcher.slurm.script import bad_nodes, command

# How long a queued job is watched. Slurm judges limits when it takes a job, or in its next round.
WATCH_S = 4.0
_LOOK_S = 0.5
# 22.05 says PartitionConfig first, and what is wrong with it in the scheduler's next round.
_VAGUE, _VAGUE_S = "PartitionConfig", 2.5


def check(plan: JobPlan) -> list[str]:
    """The command line that queues the job, once all that can be known beforehand is in order.

    Raises ConfigError for a job that could never run, NoAnswer without a controller. Queues nothing.
    The script and the log folder are there: Slurm looks at the script, and a job whose log cannot be
    opened fails without a message.
    """
    commands.ping()
    found = look()
    known, request = _known(found), _request(plan, found)
    if conflicts := problems(found, request):
        raise ConfigError(conflicts)
    trial = commands.sbatch(command(plan, known=known, how="--test-only"), cwd=plan.workdir)
    down = must_wait(found, request)
    if trial.code != 0 and not refused.passing(trial.err, nodes_are_down=down):
        raise refusal(trial, plan, found)
    return command(plan, known=known)


def _known(found: list[SlurmPartition]) -> set[str] | None:
    return {node.name for one in found for node in one.nodes} or None


def _request(plan: JobPlan, found: list[SlurmPartition]) -> ResourceRequest:
    return request_of(plan, bad=bad_nodes(plan, _known(found)))


def look() -> list[SlurmPartition]:
    """The partitions and their nodes; empty where this version of Slurm shows them in another way."""
    # -a: a site hides partitions that not everybody may use, and sbatch takes jobs for them all the same.
    partitions = ask("scontrol", "-a", "show", "partition", "-o")
    nodes = ask("sinfo", "-a", "-h", "-N", "-o", SINFO_FORMAT)
    if partitions.code != 0 or nodes.code != 0:
        return []
    return read_partitions(partitions.out, nodes.out)


def refusal(answer: SlurmResult, plan: JobPlan, found: list[SlurmPartition]) -> ConfigError:
    """sbatch has refused: why, and what there is instead."""
    return ConfigError([refused.in_words(answer.code, answer.err, plan, _exists(plan, found))])


def watch(job: str, plan: JobPlan) -> QueueEntry | None:
    """Look at a job that has just been queued. One that can never start is cancelled: ConfigError.

    Returns it as it was seen last; None where it could not be seen.
    """
    deadline = time.monotonic() + WATCH_S
    while True:
        seen = _seen(job)
        if seen is None or seen.states[0] != "PENDING":
            return seen  # None: it cannot be asked for now; it is queued
        why = reasons.reason(seen.reason)
        vague = why.name == _VAGUE and time.monotonic() < deadline - WATCH_S + _VAGUE_S
        if why.never and not vague and not _may_pass(why, plan):
            _cancel(job)
            raise ConfigError([_hopeless(job, why, plan)])
        if time.monotonic() >= deadline or why.name not in ("", "None", "Priority", _VAGUE):
            return seen
        time.sleep(_LOOK_S)


def _may_pass(why: reasons.Reason, plan: JobPlan) -> bool:
    """The reason that stands for too many nodes stands for nodes that are down, too, in some versions."""
    if why.name != "PartitionNodeLimit":
        return False
    try:
        found = look()
    except SlurmUnavailable:
        return True
    request = _request(plan, found)
    return not problems(found, request) and must_wait(found, request)


def _seen(job: str) -> QueueEntry | None:
    try:
        answer = ask("squeue", "-h", "-t", "all", "-j", job, "-o", SQUEUE_FORMAT)
        found = read_squeue(answer.out) if answer.code == 0 else []
    except (SlurmUnavailable, Unreadable):
        return None
    return found[0] if found else None


def _cancel(job: str) -> None:
    """Out of the queue again; a failure is part of the words that follow."""
    try:
        ask("scancel", job)
    except SlurmUnavailable as error:
        raise SlurmUnavailable(
            f"job {job} can never start, and could not be cancelled: {error}"
        ) from error


def _hopeless(job: str, why: reasons.Reason, plan: JobPlan) -> Problem:
    key = why.key or "cluster.slurm"
    if plan.cluster.slurm.partition and key in ("cluster.nodes", "cluster.time_limit"):
        hint = f"look at: scontrol show partition {plan.cluster.slurm.partition}"
    elif why.name.startswith(("QOS", "Assoc", "Max")):
        hint = "sacctmgr show assoc user=$USER, and sacctmgr show qos, list the limits"
    else:
        hint = "change it, and submit again"
    return Problem(
        key, f"the job could never start: {why.words} ({why.name}); job {job} was cancelled", hint
    )


def _exists(plan: JobPlan, found: list[SlurmPartition]) -> Callable[[str], str]:
    def exists(kind: str) -> str:
        where = chosen(found, _request(plan, found)) or found
        nodes = {node.name: node for one in where for node in one.nodes}
        match kind:
            case "partitions":
                return names(found)
            case "nodes":
                return _some(list(nodes))
            case "features":
                return _some(sorted({name for node in nodes.values() for name in node.features}))
            case "gpus":
                kinds = {
                    f"{kind or 'any'} ({count} a node)"
                    for n in nodes.values()
                    for kind, count in n.gpus
                }
                return _some(sorted(kinds))
            case "reservations":
                return _column("scontrol", "show", "reservation", "-o", word="ReservationName=")
            case "accounts":
                return _column(*_ASSOCIATIONS, "format=Account", f"user={getpass.getuser()}")
            case _:
                return _column(*_ASSOCIATIONS, "format=QOS", f"user={getpass.getuser()}")

    return exists


_ASSOCIATIONS = ("sacctmgr", "-n", "-P", "show", "associations")


def _column(*argv: str, word: str = "") -> str:
    """The first words of a listing; empty where it cannot be had, e.g. without accounting."""
    try:
        answer = ask(*argv)
    except (SlurmUnavailable, ConfigError):
        return ""
    if answer.code != 0:
        return ""
    firsts = (line.split()[0] for line in answer.out.splitlines() if line.strip())
    found = {first.removeprefix(word) for first in firsts if first.startswith(word)}
    return _some(sorted({name for first in found for name in first.split(",") if name}))


def _some(listed: list[str]) -> str:
    """At most ten by name."""
    more = f", ... ({len(listed)} in all)" if len(listed) > 10 else ""
    return ", ".join(listed[:10]) + more
