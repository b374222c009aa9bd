"""The `cluster` section of a run file: where the ranks run, what starts them, and the settings of a site."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator

from lmscale.config.fields import (
    LIST_OR_TEXT,
    NUMBER_TEXT_OR_NULL,
    Seconds,
    Section,
    Texts,
    placement,
)

_NAME = re.compile(r"[A-Za-z_]\w*")
# The launcher sets these for each rank; one value for all ranks would break the job.
_OURS = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_\w+|LMSCALE_\w+|SLURM_\w+)\Z"
)
_TEXT_OR_NULL: dict[str, Any] = {"type": ["string", "null"]}


def _plain(value: str, what: str) -> str:
    """A text without control characters: they would end a line of a script, or hide in one."""
    bad = next((letter for letter in value if not letter.isprintable()), None)
    if bad is not None:
        raise ValueError(
            f"{what} contains the control character {bad!r}; write one line of plain text"
        )
    return value


def _plain_text(value: object) -> object:
    return _plain(value, repr(value)) if isinstance(value, str) else value


def _plain_texts(value: object) -> object:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        return value
    return tuple(_plain_text(entry) for entry in entries)


def _environment(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    for name, text in value.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a variable; use letters, digits and _")
        if _OURS.match(name):
            raise ValueError(f"{name} is set by the launcher for each rank; leave it out")
        if not isinstance(text, str):
            raise ValueError(f'{name} is not text; write it with quotes, e.g. {name}: "{text}"')
        _plain(text, name)
        if name == "GLOO_SOCKET_IFNAME" and ("," in text or text.startswith(("^", "="))):
            raise ValueError(
                f"GLOO_SOCKET_IFNAME is {text!r}, but gloo accepts a single interface; "
                "write its name, e.g. ib0"
            )
    return dict(value)


Text = Annotated[str, BeforeValidator(_plain_text)]
PlainTexts = Annotated[Texts, BeforeValidator(_plain_texts)]
Environment = Annotated[dict[str, str], BeforeValidator(_environment)]


def _text(doc: str, **rest: Any) -> Any:
    return placement(doc, default=None, min_length=1, schema=_TEXT_OR_NULL, **rest)


def _texts(doc: str, **rest: Any) -> Any:
    return placement(doc, default=(), schema=LIST_OR_TEXT, **rest)


class ContainerConfig(Section):
    """The container that the ranks of a Slurm job run in. The image contains lmscale and its Python."""

    kind: Literal["pyxis", "apptainer"] = placement(
        "Container runtime: pyxis uses srun --container-image, apptainer uses apptainer exec.",
        default="pyxis",
    )
    image: Text = placement(
        "Image that the runtime opens.", example="/images/lmscale.sqsh", min_length=1
    )
    mounts: PlainTexts = _texts(
        "Mounts as SOURCE:TARGET[:OPTIONS], besides the run folder and the corpora.",
        example=["/data:/data:ro"],
    )
    python: Text = placement(
        "Python interpreter inside the image.", default="python3", min_length=1
    )


class SlurmConfig(Section):
    """Settings of a Slurm site. Every value is quoted in the batch script; none is template code."""

    partition: Text | None = _text(
        "Slurm partition. null means the default of the site.", example="gpu"
    )
    account: Text | None = _text(
        "Slurm account. null means the default of the user.", example="project1"
    )
    qos: Text | None = _text(
        "Quality of service. null means the default of the site.", example="normal"
    )
    reservation: Text | None = _text("Name of a reservation. null means none.", example="training")
    constraint: Text | None = _text(
        "Features that the nodes must have. null means any.", example="h100"
    )
    gpus: Literal["gres", "gpus-per-node", "none"] = placement(
        "How cluster.gpus_per_node is requested; none means not at all, for sites that give "
        "whole nodes.",
        default="gres",
    )
    gpu_type: Text | None = _text(
        "Type of GPU in the request, such as h100 in gres=gpu:h100:8. null means any.",
        example="h100",
    )
    cpus_per_task: int | None = placement(
        "Number of cores per task; with launch: node a task contains all ranks of a node. null "
        "means the default of the site.",
        example=96,
        default=None,
        ge=1,
    )
    memory: Text | None = _text(
        "Memory per node, as in sbatch --mem; 0 means all of it. null means the default of the "
        "site.",
        example="0",
    )
    exclusive: bool = placement("Whether no other job may run on the nodes.", default=False)
    exclude: PlainTexts = _texts("Nodes that are never used.", example=["node017"])
    nodelist: PlainTexts = _texts(
        "Nodes that must be used; the job waits while one of them is down.",
        example=["node[001-004]"],
    )
    launch: Literal["node", "rank"] = placement(
        "Tasks per node. node: one task with a supervisor that restarts ranks in place; rank: "
        "one task per rank.",
        default="node",
    )
    mpi: Text | None = _text(
        "Value of srun --mpi. null means the default of the site.", example="pmix"
    )
    signal: Literal["USR2", "USR1", "TERM"] = placement(
        "Signal that asks the job to save before its time limit; NCCL handles USR1 itself.",
        default="USR2",
    )
    signal_lead: Seconds = placement(
        "Time before the time limit at which a checkpoint is requested, in seconds; Slurm may "
        "send the signal up to 60 s early.",
        default=180,
        ge=1,
    )
    requeue: bool = placement(
        "Whether a run continues in the same job; false means in follow-up jobs, for sites that"
        " do not requeue.",
        default=True,
    )
    modules: PlainTexts = _texts("Arguments of module load.", example=["cuda/12.8"])
    prolog: PlainTexts = _texts(
        "Commands that the batch script runs first; they are quoted, so the shell does not "
        "expand them.",
        example=["ulimit -l unlimited"],
    )
    container: ContainerConfig | None = placement(
        "Container in which the ranks run. null means none.",
        example={"image": "/images/lmscale.sqsh"},
        default=None,
    )
    sbatch: PlainTexts = _texts(
        "Further options of sbatch, passed on unchanged.", example=["--mail-type=FAIL"]
    )
    srun: PlainTexts = _texts(
        "Further options of srun, passed on unchanged.", example=["--kill-on-bad-exit=1"]
    )
    template: str | None = _text(
        "Path of a batch script of the site. null means cluster/slurm/job.sh.",
        example="site/job.sh",
    )


class MpiConfig(Section):
    """Hosts and options of mpirun."""

    hosts: PlainTexts = _texts(
        "Hosts as HOST or HOST:SLOTS, one entry per node; an empty list means this host.",
        example=["node1:8", "node2:8"],
    )
    options: PlainTexts = _texts(
        "Further options of mpirun, passed on unchanged.", example=["--bind-to", "none"]
    )


class ClusterKind(NamedTuple):
    """Where a cluster kind is implemented. The launcher imports the module when the kind is used."""

    module: str
    class_name: str
    section: str | None = None  # its key below `cluster`; None: it has no settings of its own
    ends_jobs: bool = False  # it ends a job at cluster.time_limit


# Every cluster kind; the values of cluster.kind are derived from it (docs/extending.md).
CLUSTER_KINDS = {
    "local": ClusterKind("lmscale_launcher.clusters.local", "LocalCluster"),
    "mpi": ClusterKind("lmscale_launcher.clusters.mpi", "MpiCluster", section="mpi"),
    "slurm": ClusterKind(
        "lmscale_launcher.slurm.slurm_cluster", "SlurmCluster", section="slurm", ends_jobs=True
    ),
}
PLANNED_KINDS = ("kubernetes",)  # refused by lmscale/config/rules.py

if TYPE_CHECKING:
    KindName = str
else:
    KindName = Literal[(*CLUSTER_KINDS, *PLANNED_KINDS)]


class ClusterConfig(Section):
    """Where the ranks run, and what starts them."""

    kind: KindName = placement(
        "What starts the ranks; kubernetes is not supported yet.", default="local"
    )
    nodes: int = placement("Number of hosts.", example=2, default=1, ge=1)
    min_nodes: int | None = placement(
        "Smallest number of hosts with which a run continues. null means all of them.",
        example=1,
        default=None,
        ge=1,
    )
    ranks_per_node: int | None = placement(
        "Number of ranks per host. null means one per GPU, or 2 without a GPU.",
        example=8,
        default=None,
        ge=1,
    )
    gpus_per_node: int | None = placement(
        "Number of GPUs per host. null means those that the host has.",
        example=8,
        default=None,
        ge=0,
    )
    time_limit: Seconds | None = placement(
        'Time limit of a job, in seconds or as text such as "2h". null means no limit.',
        example="2h",
        default=None,
        ge=1,
        schema=NUMBER_TEXT_OR_NULL,
    )
    max_restarts: int = placement(
        "Number of restarts without a newer checkpoint before a run fails.",
        example=3,
        default=0,
        ge=0,
    )
    stall_limit: Seconds | None = placement(
        "Time without progress of any rank after which the ranks are ended and started again, "
        "in seconds. null means 50 times the longest step so far, and at least 30 s (600 s with"
        " engine.compile).",
        example="10m",
        default=None,
        ge=1,
        schema=NUMBER_TEXT_OR_NULL,
    )
    env: Environment = placement(
        "Environment variables of every rank.", example={"NCCL_DEBUG": "WARN"}, default={}
    )
    slurm: SlurmConfig = placement("Settings for kind slurm.", default_factory=SlurmConfig)
    mpi: MpiConfig = placement("Settings for kind mpi.", default_factory=MpiConfig)

    @property
    def save_lead_s(self) -> int | None:
        """Seconds before the time limit at which the cluster asks for a checkpoint; None: it does not ask."""
        section = CLUSTER_KINDS[self.kind].section
        return getattr(getattr(self, section), "signal_lead", None) if section else None
