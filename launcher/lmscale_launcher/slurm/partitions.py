"""What a cluster's partitions and nodes can give, and what a plan asks for beyond it. Pure."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lmscale.base.errors import Problem
from lmscale.base.units import parse_seconds, show_seconds
from lmscale_launcher.clusters.job import JobPlan
from lmscale_launcher.slurm.script import passed_through, words
from lmscale_launcher.slurm.states import expand

# One line a node and partition; features last, as nothing else may hold a bar.
SINFO_FORMAT = "%R|%N|%c|%m|%T|%G|%f"


_BYTES_A_MIB = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


_UNUSABLE = ("down", "drain", "fail", "error", "unknown", "inval", "no_respond", "blocked")


@dataclass(frozen=True, slots=True)
class SlurmNode:
    """One node, as it is configured."""

    name: str
    cpus: int
    memory_mib: int
    gpus: tuple[tuple[str, int], ...]  # (type or "", count)
    features: tuple[str, ...]
    usable: bool  # neither down nor drained

    def count_gpus(self, kind: str | None = None) -> int:
        """Its GPUs, of one type or of any."""
        return sum(count for name, count in self.gpus if kind in (None, name))


@dataclass(frozen=True, slots=True)
class SlurmPartition:
    """One partition and its limits; None: there is none."""

    name: str
    default: bool
    state: str  # UP, DOWN, DRAIN, INACTIVE
    max_time_s: int | None
    max_nodes: int | None
    min_nodes: int
    nodes: tuple[SlurmNode, ...] = ()


@dataclass(frozen=True, slots=True)
class ResourceRequest:
    """What a job asks for; None where the site decides, or an option that is passed through does."""

    partitions: tuple[str, ...]
    time_s: int | None
    min_nodes: int | None
    nodes: int | None
    cpus: int | None  # of a node
    memory_mib: int | None  # of a node
    gpus: int | None  # of a node
    gpu_type: str | None
    cpus_key: str = "cluster.slurm.cpus_per_task"  # what the number of cores comes from
    wanted: tuple[str, ...] = ()  # nodes that must be among them
    excluded: tuple[str, ...] = ()


def request_of(plan: JobPlan, *, bad: Sequence[str] = ()) -> ResourceRequest:
    """What a plan asks for. An option in cluster.slurm.sbatch has the last word: sbatch judges that."""
    slurm = plan.cluster.slurm
    passed = words(slurm.sbatch, "cluster.slurm.sbatch")

    def free(*names: str) -> bool:
        return passed_through(passed, names) is None

    tasks = plan.ranks_per_node if slurm.launch == "rank" else 1
    cores = tasks * (slurm.cpus_per_task or 1)
    partition = passed_through(passed, ("-p", "--partition")) or slurm.partition
    sized = free("-N", "--nodes", "-w", "--nodelist", "-n", "--ntasks")
    gpus = plan.gpus_per_node if slurm.gpus != "none" else 0
    asks_gpus = gpus and free("--gres", "-G", "--gpus", "--gpus-per-node", "--gpus-per-task")
    return ResourceRequest(
        partitions=tuple(partition.split(",")) if partition else (),
        time_s=plan.cluster.time_limit if free("-t", "--time", "--time-min") else None,
        min_nodes=plan.min_nodes if sized else None,
        nodes=plan.nodes if sized else None,
        cpus=cores if cores > 1 and free("-c", "--cpus-per-task") else None,
        cpus_key="cluster.slurm.cpus_per_task" if slurm.cpus_per_task else "cluster.ranks_per_node",
        memory_mib=_mib(slurm.memory) if slurm.memory and free("--mem") else None,
        gpus=gpus if asks_gpus else None,
        gpu_type=slurm.gpu_type if asks_gpus else None,
        wanted=_hosts(slurm.nodelist),
        excluded=(*_hosts(slurm.exclude), *bad),
    )


def _hosts(lists: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(host for text in lists for host in expand(text))
    except ValueError:  # sbatch judges
        return ()


def read_partitions(partitions: str, nodes: str) -> list[SlurmPartition]:
    """From `scontrol show partition -o` and `sinfo -h -N -o SINFO_FORMAT`."""
    members: dict[str, dict[str, SlurmNode]] = {}
    for line in nodes.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 7:
            members.setdefault(fields[0], {})[fields[1]] = _node(fields)
    found = []
    for line in partitions.splitlines():
        facts = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
        if name := facts.get("PartitionName"):
            found.append(
                SlurmPartition(
                    name, facts.get("Default") == "YES", facts.get("State", "UP"),
                    _seconds(facts.get("MaxTime", "")), _count(facts.get("MaxNodes", "")),
                    _count(facts.get("MinNodes", "")) or 0, tuple(members.get(name, {}).values()),
                )
            )  # fmt: skip
    return found


def chosen(partitions: Sequence[SlurmPartition], request: ResourceRequest) -> list[SlurmPartition]:
    """Those that the job may go to: the ones it names, else the default."""
    if request.partitions:
        return [one for one in partitions if one.name in request.partitions]
    return [one for one in partitions if one.default]


def problems(partitions: Sequence[SlurmPartition], request: ResourceRequest) -> list[Problem]:
    """What can never be had. With several partitions: where none of them could run the job."""
    unknown = [name for name in request.partitions if name not in {one.name for one in partitions}]
    if unknown or not chosen(partitions, request):
        if not partitions:
            return []  # nothing is known: sbatch judges
        fact = f"there is no partition {', '.join(unknown)}" if unknown else (
            "none is given, and the site has no default"
        )  # fmt: skip
        return [Problem("cluster.slurm.partition", fact, f"there are: {names(partitions)}")]
    found = [list(_of_partition(one, request)) for one in chosen(partitions, request)]
    return min(found, key=len)


def names(partitions: Sequence[SlurmPartition]) -> str:
    """`main (default), high`."""
    return ", ".join(one.name + (" (default)" if one.default else "") for one in partitions)


def must_wait(partitions: Sequence[SlurmPartition], request: ResourceRequest) -> bool:
    """Whether nodes that the job needs are down or drained, wherever it may go."""
    short = False
    for one in chosen(partitions, request):
        fit = [node for node in _left(one, request) if _fits(node, request)]
        up = sum(node.usable for node in fit)
        down = [node.name for node in fit if not node.usable]
        if up >= (request.min_nodes or 1) and not set(down) & set(request.wanted):
            return False
        short = short or bool(down)
    return short


def _of_partition(one: SlurmPartition, request: ResourceRequest) -> Iterator[Problem]:
    where = f"partition {one.name}"
    if request.time_s and one.max_time_s is not None and request.time_s > one.max_time_s:
        limit = show_seconds(one.max_time_s)
        fact = f"{show_seconds(request.time_s)}, but {where} allows {limit}"
        hint = f"at most {limit}; with cluster.max_restarts the run continues after its time limit"
        yield Problem("cluster.time_limit", fact, hint)
    if one.max_nodes is not None and request.nodes and request.nodes > one.max_nodes:
        # Also where min_nodes is within it: such a job waits for ever (22.05).
        fact = f"{_count_of(request.nodes)}, but {where} allows {one.max_nodes} a job"
        yield Problem("cluster.nodes", fact, f"at most {one.max_nodes}, or another partition")
    elif one.nodes and request.min_nodes and request.min_nodes > len(one.nodes):
        key = "cluster.nodes" if request.min_nodes == request.nodes else "cluster.min_nodes"
        fact = f"{_count_of(request.min_nodes)}, but {where} has {len(one.nodes)}"
        yield Problem(key, fact, f"at most {len(one.nodes)}, or another partition")
    if request.nodes and request.nodes < one.min_nodes:
        fact = f"{_count_of(request.nodes)}, but {where} asks for at least {one.min_nodes}"
        yield Problem("cluster.nodes", fact, f"at least {one.min_nodes}, or another partition")
    if one.nodes:
        yield from _of_nodes(one, request)


def _of_nodes(one: SlurmPartition, request: ResourceRequest) -> Iterator[Problem]:
    where, found = f"partition {one.name}", False
    for key, asked, unit, have in _sizes(request):
        most = max(have(node) for node in one.nodes)
        if asked > most:
            found = True
            what = f"the nodes of {where} have {'at most ' if most else ''}{most or 'none'}"
            yield Problem(key, f"{asked} {unit} a node, but {what}", _at_most(most, key))
    if found or request.min_nodes is None:
        return
    fit = sum(_fits(node, request) for node in _left(one, request))
    if fit < request.min_nodes <= len(one.nodes):
        asked_for = ", ".join(f"{asked} {unit}" for _, asked, unit, _ in _sizes(request))
        has = f"have {asked_for}" if asked_for else "are left"
        besides = " besides the excluded ones" if request.excluded else ""
        fact = f"{_count_of(request.min_nodes)}, but only {fit} of {where} {has}{besides}"
        hint = (
            f"at most {fit}, or ask for less a node"
            if fit
            else "leave fewer out, or ask for less a node"
        )
        yield Problem("cluster.nodes", fact, hint)


Size = tuple[str, int, str, Callable[[SlurmNode], int]]


def _sizes(request: ResourceRequest) -> Iterator[Size]:
    """What of a node is asked for: key, amount, unit, and what a node has of it."""
    if request.gpus:
        kind = request.gpu_type
        key = "cluster.slurm.gpu_type" if kind else "cluster.gpus_per_node"
        yield "cluster.gpus_per_node", request.gpus, "GPUs", SlurmNode.count_gpus
        if kind:
            yield key, request.gpus, f"{kind} GPUs", lambda node: node.count_gpus(kind)
    if request.cpus:
        yield request.cpus_key, request.cpus, "cores", lambda node: node.cpus
    if request.memory_mib:
        yield "cluster.slurm.memory", request.memory_mib, "MiB", lambda node: node.memory_mib


def _left(one: SlurmPartition, request: ResourceRequest) -> list[SlurmNode]:
    return [node for node in one.nodes if node.name not in request.excluded]


def _fits(node: SlurmNode, request: ResourceRequest) -> bool:
    return all(have(node) >= asked for _, asked, _, have in _sizes(request))


def _at_most(most: int, key: str) -> str:
    if not most:
        return "choose a partition that has them (sinfo -o '%R %G')"
    if key == "cluster.gpus_per_node":
        return f"at most {most}, with more nodes (cluster.nodes)"
    return f"at most {most}, or another partition"


def _node(fields: Sequence[str]) -> SlurmNode:
    state = fields[4].lower()
    gpus = re.findall(r"\bgpu:(?:([^:,()]+):)?(\d+)", fields[5])
    return SlurmNode(
        fields[1], _count(fields[2]) or 0, _count(fields[3]) or 0,
        tuple((kind, int(count)) for kind, count in gpus),
        tuple(name for name in fields[6].split(",") if name and name != "(null)"),
        not state.startswith(_UNUSABLE) and not state.endswith("*"),
    )  # fmt: skip


def _count_of(nodes: int) -> str:
    return f"{nodes} node{'s' if nodes != 1 else ''}"


def _count(text: str) -> int | None:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


def _mib(text: str) -> int | None:
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip(), re.IGNORECASE)
    return int(int(match[1]) * _BYTES_A_MIB[match[2].upper()]) if match else None


def _seconds(text: str) -> int | None:
    """`7-00:00:00`, as scontrol writes it; None: UNLIMITED, or not known."""
    return parse_seconds(text) if re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", text) else None
