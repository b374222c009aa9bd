"""What sbatch says when it refuses a job, in words: the key to change and what there is instead.

The sentences are those of Slurm's table of errors, 22.05 to 24.11.
"""

import re
from collections.abc import Callable, Sequence

from launcher.jobs.plan import JobPlan
from lmscale.errors import Problem
from lmscale.run.bad_nodes import read_bad_nodes

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
    return [line for line in lines if line] or ["without a word"]


def _first(words: str) -> str:
    return _lines(words)[0]


def _last(words: str) -> str:
    return re.sub(r"^(?:Batch job submission failed|allocation failure): ", "", _lines(words)[-1])
