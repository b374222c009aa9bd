"""Slurm's terms for why a job waits and how it ended, explained. Complete for Slurm 24.11.

sbatch's refusals of a job as text: the key to change and what exists instead.

The sentences are those of Slurm's table of errors, 22.05 to 24.11.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmscale.base.errors import Problem
from lmscale.run_folder.bad_nodes import read_bad_nodes
from lmscale_launcher.clusters.job import JobPlan

_REASONS = {
    "": "",
    "None": "",
    "Prolog": "its nodes are being prepared (prolog)",
    "Priority": "jobs of higher priority are before it",
    "Dependency": "it waits for another job",
    "Resources": "it waits for free nodes",
    "PartitionNodeLimit": "more nodes than the partition has or allows",
    "PartitionTimeLimit": "a longer time limit than the partition allows",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionConfig": "the partition cannot give what it asks for (nodes, time, or cores of a node)",
    "JobHeldAdmin": "held by an administrator, who alone can release it",
    "JobHeldUser": "held by its owner: scontrol release JOB",
    "JobHeld": "held: scontrol release JOB",
    "BeginTime": "its begin time is not reached (after a requeue: a short pause)",
    "Licenses": "it waits for licenses",
    "Reservation": "its reservation has not begun",
    "ReservationDeleted": "its reservation was deleted",
    "ReservationInvalid": "its reservation is not valid",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved (maintenance?)",
    "FrontEndDown": "no front end node is up",
    "SchedDefer": "asked to start at once, while the scheduler defers",
    "NodeDown": "a node that it needs is down",
    "BadConstraints": "no nodes can ever satisfy what it asks for",
    "Constraints": "no nodes satisfy what it asks for",
    "SystemFailure": "Slurm, the file system or the network failed",
    "JobLaunchFailure": "a node could not start its script (log folder, work folder, user or file system)",
    "NonZeroExitCode": "its script ended with an error",
    "RaisedSignal": "its script was ended by a signal",
    "TimeLimit": "its time limit was reached",
    "InactiveLimit": "it was idle for too long",
    "InvalidAccount": "its account is not valid",
    "InvalidBankAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
    "InvalidReason": "for a reason that Slurm does not name",
    "InvaildReason": "for a reason that Slurm does not name",  # as Slurm spells it
    "Cleaning": "its earlier start is still being cleaned up",
    "QOSNotAllowed": "its QOS is not allowed in this account or partition",
    "AccountNotAllowed": "its account is not allowed in this partition",
    "QOSUsageThreshold": "its QOS has used up its share",
    "DependencyNeverSatisfied": "it waits for a job that did not end as required, for ever",
    "JobHoldMaxRequeue": "held: requeued too often (MaxBatchRequeue)",
    "JobArrayTaskLimit": "as many tasks of its array run as are allowed at once",
    "BurstBufferResources": "it waits for room in the burst buffer",
    "BurstBufferStageIn": "the burst buffer is being filled",
    "BurstBufferOperation": "an operation of the burst buffer failed",
    "PowerNotAvail": "it waits for electrical power",
    "PowerReserved": "electrical power is reserved for other jobs",
    "DeadLine": "it cannot end before its deadline",
    "AccountingPolicy": "a limit of accounting stands against it",
    "FedJobLock": "another cluster of the federation is looking at it",
    "OutOfMemory": "it ran out of memory",
    "MaxMemPerLimit": "more memory than the site allows per node or core",
    "BlockMaxError": "its block of nodes has too many errors",
    "BlockFreeAction": "its block of nodes is being freed",
    "MaxRequeue": "requeued too often",
}

# Reasons that only a change of the request can end. A job with one of them waits for ever.
_NEVER = frozenset(
    {
        "PartitionNodeLimit", "PartitionTimeLimit", "PartitionConfig", "BadConstraints", "InvalidAccount",
        "InvalidBankAccount", "InvalidQOS", "QOSNotAllowed", "AccountNotAllowed",
        "DependencyNeverSatisfied", "MaxMemPerLimit", "ReservationDeleted", "ReservationInvalid",
        "DeadLine",
    }
)  # fmt: skip

_KEYS = {
    "PartitionNodeLimit": "cluster.nodes",
    "PartitionTimeLimit": "cluster.time_limit",
    "InvalidAccount": "cluster.slurm.account",
    "InvalidBankAccount": "cluster.slurm.account",
    "AccountNotAllowed": "cluster.slurm.account",
    "InvalidQOS": "cluster.slurm.qos",
    "QOSNotAllowed": "cluster.slurm.qos",
    "MaxMemPerLimit": "cluster.slurm.memory",
    "ReservationDeleted": "cluster.slurm.reservation",
    "ReservationInvalid": "cluster.slurm.reservation",
    "DependencyNeverSatisfied": "cluster.slurm.sbatch",
    "DeadLine": "cluster.slurm.sbatch",
}

_LIMIT = re.compile(
    r"(?P<who>Assoc(?:iation)?|QOS|)(?P<kind>Grp|Max|Min|)"
    r"(?P<what>Cpu|CPU|Memory|Mem|Nodes?|Energy|GRES|License|BB|Billing|Unknown|SubmitJobs?|Jobs?|WallDuration"
    r"|Wall|Resource|Time)"
    r"(?P<time>RunMinutes|Minutes|)(?:Per(?P<per>Job|Node|User|Account)|)(?:Limit|NotSatisfied|)"
)
_WHAT = {
    "cpu": "cores", "mem": "memory", "memory": "memory", "node": "nodes", "nodes": "nodes", "energy": "energy",
    "gres": "GPUs", "license": "licenses", "bb": "burst buffer", "billing": "billing units",
    "unknown": "some resource", "job": "running jobs", "jobs": "running jobs", "submitjob": "queued jobs",
    "submitjobs": "queued jobs", "wallduration": "time", "wall": "time", "resource": "resources", "time": "time",
}  # fmt: skip
_WHAT_KEYS = {
    "cores": "cluster.slurm.cpus_per_task", "memory": "cluster.slurm.memory", "nodes": "cluster.nodes",
    "GPUs": "cluster.gpus_per_node", "time": "cluster.time_limit",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a job waits."""

    name: str  # Slurm's own, e.g. PartitionNodeLimit
    words: str  # empty where there is none
    never: bool = False  # waiting alone cannot help
    key: str = ""  # of the run file, where one is concerned


def reason(text: str) -> Reason:
    """What squeue, sacct or scontrol gave as a reason; with what Slurm adds to it."""
    text = text.strip().strip("()")
    name, _, rest = text.partition(",")
    name = name.strip()
    if name in _REASONS:
        words = _REASONS[name]
        if rest.strip():
            words = f"{words}: {_spaced(rest)}"
        return Reason(name, words, name in _NEVER, _KEYS.get(name, ""))
    if match := _LIMIT.fullmatch(name):
        return _limit(name, match)
    return Reason(text, _spaced(text))


def _spaced(text: str) -> str:
    """Slurm joins the words of its sentences with underscores, and lists nodes after a colon."""
    text = re.sub(r"^\s*UnavailableNodes:", "", text.strip())
    return text.replace("_", " ") if " " not in text else text


def _limit(name: str, match: re.Match[str]) -> Reason:
    """`QOSMaxGRESPerUser` and its 150 relatives: who limits what, for whom."""
    what = _WHAT[match["what"].lower()]
    if match["time"]:
        what = f"minutes of {what}"
    owner = {"QOS": "its QOS", "": "its QOS"}.get(match["who"], "its account or user")
    if match["kind"] == "Min":
        return Reason(name, f"less {what} than {owner} requires", True, _WHAT_KEYS.get(what, ""))
    per = match["per"]
    if match["kind"] != "Max" or per in ("User", "Account") or "Job" in match["what"]:
        whose = {"User": "of a user ", "Account": "of an account "}.get(per or "", "")
        return Reason(name, f"the limit of {what} {whose}in {owner} is used up".replace("  ", " "))
    each = {"Job": "of a job", "Node": "of a node"}.get(per or "", "of a job")
    bare = what.removeprefix("minutes of ")
    key = "cluster.time_limit" if match["time"] else _WHAT_KEYS.get(bare, "")
    return Reason(name, f"more {what} {each} than {owner} allows", True, key)


# State -> where it stands, and what it means.
WAITING = {
    "PENDING": "",
    "CONFIGURING": "its nodes are booting",
    "REQUEUED": "requeued",
    "REQUEUE_FED": "requeued, on any cluster of the federation",
    "REQUEUE_HOLD": "requeued, then held: scontrol release JOB",
    "SPECIAL_EXIT": "requeued in a special state, then held: scontrol release JOB",
    "RESV_DEL_HOLD": "held, because its reservation was deleted",
    "POWER_UP_NODE": "its nodes are booting",
    "EXPEDITING": "being requeued before other jobs",
}
AT_WORK = {
    "RUNNING": "",
    "COMPLETING": "it is ending: its last processes are being cleaned up",
    "SUSPENDED": "suspended",
    "STOPPED": "stopped by a signal",
    "SIGNALING": "",
    "RESIZING": "its size is changing",
    "STAGE_OUT": "its files are being staged out",
    "UPDATE_DB": "",
}
ENDED = {
    "COMPLETED": "",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
    "TIMEOUT": "its time limit was reached",
    "NODE_FAIL": "a node failed",
    "PREEMPTED": "a job of higher priority took its nodes",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "its deadline was reached",
    "OUT_OF_MEMORY": "out of memory on a node",
    "LAUNCH_FAILED": "a node could not start it",
    "RECONFIG_FAIL": "a node could not be configured for it",
}
# A copy of the job runs on another cluster of a federation: this cluster knows no more.
ELSEWHERE = {"REVOKED": "it was taken over by another cluster of the federation"}


# What there is of a kind ("accounts"), for hints; empty where that cannot be told.
Exists = Callable[[str], str]

# (sbatch's words, key, the fact, kind of thing to list, what to do). {value} is the key's.
_TABLE: tuple[tuple[str, str, str, str, str], ...] = (
    ("Invalid partition name", "partition", "there is no partition {value}", "partitions", ""),
    ("No partition specified", "partition", "none is given, and the site has no default", "partitions", ""),
    ("Invalid account|account/partition combination|InvalidAccount", "account",
     "account {value} does not exist, or you may not use it in this partition", "accounts", ""),
    ("Invalid qos", "qos", "there is no QOS {value} for you here", "qos", ""),
    ("Access denied to requested reservation", "reservation",
     "you may not use reservation {value}", "reservations", "ask who made it"),
    ("Requested reservation not usable now", "reservation", "reservation {value} cannot be used now",
     "reservations", ""),
    ("reservation", "reservation", "there is no reservation {value}", "reservations", ""),
    ("Invalid feature", "constraint", "no node has the feature {value}", "features", ""),
    ("Invalid node name|Requested nodes not in this partition", "nodelist",
     "a node of cluster.slurm.nodelist, .exclude or RUN/bad-nodes is not in the partition: {nodes}", "nodes", ""),
    ("group not permitted to use this partition|AllowGroups|Access/permission denied", "partition",
     "you may not use partition {value}", "partitions", "or ask your site"),
    ("Required partition not available|partition configuration not available", "partition",
     "partition {value} takes no jobs now (drained or inactive)", "partitions", ""),
    ("Invalid generic resource|Invalid (?:GRES|TRES)", "gpu_type",
     "the cluster does not know the GPUs that are asked for", "gpus", ""),
    ("Memory required|Memory specification|Invalid memory", "memory",
     "more memory a node than any node has", "", "less memory, or another partition"),
    ("CPU count per node|CPU count specification|More processors requested", "cpus_per_task",
     "more cores a node than any node has", "", "fewer cores, or another partition"),
    ("Requested time limit is invalid|Invalid --time", "time_limit",
     "the time limit is missing or not allowed here", "", "set cluster.time_limit, within the partition's limit"),
    ("Node count specification invalid", "nodes", "the number of nodes is not allowed here", "",
     "look at the partition's limits: scontrol show partition"),
    ("violates accounting/QOS policy|submit limit", "qos",
     "a limit of your account or QOS forbids this job: its size, its time or your number of jobs", "",
     "sacctmgr show assoc user=$USER, and sacctmgr show qos, list the limits"),
    ("Invalid license", "sbatch", "the cluster does not know the licenses in cluster.slurm.sbatch", "",
     "scontrol show license"),
    ("dependency", "sbatch", "the dependency cannot be met", "", "look at the options in cluster.slurm.sbatch"),
    ("Requested node configuration is not available", "nodes",
     "no nodes of the partition have all that is asked for together (nodes, cores, memory, GPUs, features, "
     "excluded nodes)", "", "compare with: sinfo -N -o '%N %P %c %m %G %f'"),
)  # fmt: skip
_UNDER_CLUSTER = ("time_limit", "nodes")
# Not for ever: such a job may be queued, and waits.
_PASSING = re.compile(
    r"Requested nodes are busy|Required node not available|resources too fragmented"
    r"|insufficient priority|can not start immediately|PrologSlurmctld|Licenses currently",
    re.IGNORECASE,
)
_NOT_AVAILABLE = re.compile("Requested node configuration is not available", re.IGNORECASE)


def passing(words: str, *, nodes_are_down: bool) -> bool:
    """Whether --test-only says no to a job that would only have to wait.

    With a node down, 22.05 has the same words for a job that fits as for one that never will.
    """
    return bool(_PASSING.search(words)) or (nodes_are_down and bool(_NOT_AVAILABLE.search(words)))


def in_words(code: int, words: str, plan: JobPlan, exists: Exists) -> Problem:
    """One problem for all that sbatch said."""
    if code == 255 or re.search(_OPTION, words):
        return _bad_option(words, plan)
    for pattern, key, fact, kind, hint in _TABLE:
        if re.search(pattern, words, re.IGNORECASE):
            there_are = exists(kind) if kind else ""
            hints = [f"there are: {there_are}"] if there_are else []
            if kind and not there_are and not hint:
                hints = [f"leave it out, or look for {kind} with your site"]
            path = f"cluster.{key}" if key in _UNDER_CLUSTER else f"cluster.slurm.{key}"
            if key == "nodelist" and not plan.cluster.slurm.nodelist:
                path = "cluster.slurm.exclude"
            told = fact.format(value=_value(plan, key) or "(none given)", nodes=_nodes(plan))
            return Problem(
                path, f"{told} (sbatch: {_last(words)})", "; ".join([*hints, hint]).strip("; ")
            )
    return Problem(
        "cluster.slurm", f"sbatch refused the job: {_last(words)}",
        "see the script and its options: lmscale submit --dry-run",
    )  # fmt: skip


_OPTION = r"nrecognized option|invalid option|Invalid numeric value|is not a valid"
_OF_OPTION = {
    "time": "cluster.time_limit", "mem": "cluster.slurm.memory", "nodes": "cluster.nodes",
    "cpus-per-task": "cluster.slurm.cpus_per_task", "signal": "cluster.slurm.signal_lead",
}  # fmt: skip


def _bad_option(words: str, plan: JobPlan) -> Problem:
    match = re.search(r"option '?-*-?([\w-]+)(?:=[^']*)?'?", words) or re.search(
        r"--([\w-]+)", words
    )
    name = match[1].lstrip("-") if match else ""
    passed = [one for one in plan.cluster.slurm.sbatch if name and name in one]
    key = "cluster.slurm.sbatch" if passed else _OF_OPTION.get(name, "cluster.slurm.sbatch")
    return Problem(key, f"sbatch does not take it: {_first(words)}", "see: man sbatch")


def _value(plan: JobPlan, key: str) -> str:
    value = getattr(plan.cluster if key in _UNDER_CLUSTER else plan.cluster.slurm, key, "")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(value)
    return str(value or "")


def _nodes(plan: JobPlan) -> str:
    bad = [node.host for node in read_bad_nodes(plan.folder)]
    return ", ".join([*plan.cluster.slurm.nodelist, *plan.cluster.slurm.exclude, *bad])


def _lines(words: str) -> list[str]:
    lines = (re.sub(r"^\w+: (?:error: )?", "", line).strip() for line in words.splitlines())
    return [line for line in lines if line] or ["without a message"]


def _first(words: str) -> str:
    return _lines(words)[0]


def _last(words: str) -> str:
    return re.sub(r"^(?:Batch job submission failed|allocation failure): ", "", _lines(words)[-1])
