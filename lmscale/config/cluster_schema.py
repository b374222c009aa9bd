"""The `cluster` section: where the ranks run, who starts them, and what a site needs to be told."""

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
# Set by the launcher for each rank: a value for all of them would break the job.
_OURS = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_\w+|LMSCALE_\w+|SLURM_\w+)\Z"
)
_TEXT_OR_NULL: dict[str, Any] = {"type": ["string", "null"]}


def _plain(value: str, what: str) -> str:
    """A text without control characters: they would end a line of a script, or hide in one."""
    bad = next((letter for letter in value if not letter.isprintable()), None)
    if bad is not None:
        raise ValueError(
            f"{what} holds the control character {bad!r}; write one line of plain text"
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
            raise ValueError(f"{name!r} is no name of a variable; use letters, digits and _")
        if _OURS.match(name):
            raise ValueError(f"{name} is set by the launcher for each rank; leave it out")
        if not isinstance(text, str):
            raise ValueError(f'{name} is not text; write it with quotes, e.g. {name}: "{text}"')
        _plain(text, name)
        if name == "GLOO_SOCKET_IFNAME" and ("," in text or text.startswith(("^", "="))):
            raise ValueError(
                f"GLOO_SOCKET_IFNAME is {text!r}, but gloo takes one interface and no list; "
                "write its name, e.g. ib0"
            )
    return dict(value)


Text = Annotated[str, BeforeValidator(_plain_text)]
PlainTexts = Annotated[Texts, BeforeValidator(_plain_texts)]
Environment = Annotated[dict[str, str], BeforeValidator(_environment)]


def _text(doc: str, **rest: Any) -> Any:
    return placement(doc, default=None, min_length=1, schema=_TEXT_OR_NULL, **rest)


def _texts(doc: str) -> Any:
    return placement(doc, default=(), schema=LIST_OR_TEXT)


class ContainerConfig(Section):
    """The image that the ranks of a Slurm job run in. lmscale and its Python stand in the image."""

    kind: Literal["pyxis", "apptainer"] = placement(
        "pyxis: srun --container-image; apptainer: apptainer exec", default="pyxis"
    )
    image: Text = placement("what the runtime opens", example="/images/lmscale.sqsh", min_length=1)
    mounts: PlainTexts = _texts("SOURCE:TARGET[:OPTIONS], besides the run folder and the corpora")
    python: Text = placement("interpreter inside the image", default="python3", min_length=1)


class SlurmConfig(Section):
    """What a Slurm site wants to be told. Every value is quoted; none is template code."""

    partition: Text | None = _text("null: the site's default")
    account: Text | None = _text("null: the user's default")
    qos: Text | None = _text("quality of service")
    reservation: Text | None = _text("name of a reservation")
    constraint: Text | None = _text("features of the nodes")
    gpus: Literal["gres", "gpus-per-node", "none"] = placement(
        "how cluster.gpus_per_node is asked for; none: not at all (whole nodes)", default="gres"
    )
    gpu_type: Text | None = _text("e.g. h100: gres=gpu:h100:8")
    cpus_per_task: int | None = placement(
        "cores of a task (launch: node: of all ranks of a node); null: the site's default",
        default=None,
        ge=1,
    )
    memory: Text | None = _text("of a node, as in sbatch --mem; 0: all of it")
    exclusive: bool = placement("no other job on the nodes", default=False)
    exclude: PlainTexts = _texts("nodes never to use")
    nodelist: PlainTexts = _texts("nodes that must be used; a node that is down makes the job wait")
    launch: Literal["node", "rank"] = placement(
        "node: one task a node, our supervisor, which restarts ranks in place; rank: one task a rank",
        default="node",
    )
    mpi: Text | None = _text("srun --mpi=...; null: the site's default", example="pmix")
    signal: Literal["USR2", "USR1", "TERM"] = placement(
        "what asks the job to save before its time is over; NCCL catches USR1", default="USR2"
    )
    signal_lead: Seconds = placement(
        "seconds before the time limit at which a checkpoint is asked for; Slurm may be 60 s early",
        default=180,
        ge=1,
    )
    requeue: bool = placement(
        "go on in the same job; false: in follow-up jobs, for sites that do not requeue",
        default=True,
    )
    modules: PlainTexts = _texts("module load ...")
    prolog: PlainTexts = _texts(
        "commands of the batch script before anything else; words are quoted, nothing is expanded"
    )
    container: ContainerConfig | None = placement("null: none", default=None)
    sbatch: PlainTexts = _texts("more options of sbatch, passed on as they are")
    srun: PlainTexts = _texts("more options of srun, passed on as they are")
    template: str | None = _text("a site's own batch script; null: cluster/slurm/job.sh")


class MpiConfig(Section):
    """How mpirun reaches the ranks."""

    hosts: PlainTexts = _texts("HOST or HOST:SLOTS, one a node; empty: this host")
    options: PlainTexts = _texts("more options of mpirun, passed on as they are")


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
    """Where the ranks run."""

    kind: KindName = placement("who starts them", default="local")
    nodes: int = placement("hosts", default=1, ge=1)
    min_nodes: int | None = placement("fewest hosts to go on with; null: all", default=None, ge=1)
    ranks_per_node: int | None = placement(
        "null: one per GPU, or 2 without a GPU", default=None, ge=1
    )
    gpus_per_node: int | None = placement("null: what the host has", default=None, ge=0)
    time_limit: Seconds | None = placement(
        'in seconds, or as text like "2h"; null: none',
        default=None,
        ge=1,
        schema=NUMBER_TEXT_OR_NULL,
    )
    max_restarts: int = placement(
        "starts without a newer checkpoint before giving up", default=0, ge=0
    )
    stall_limit: Seconds | None = placement(
        "seconds without progress of any rank after which the ranks are ended and started again; null: "
        "50 times the longest step so far and at least 30 s (600 s with engine.compile)",
        default=None,
        ge=1,
        schema=NUMBER_TEXT_OR_NULL,
    )
    env: Environment = placement("variables of every rank, e.g. NCCL_DEBUG", default={})
    slurm: SlurmConfig = placement("of kind slurm", default_factory=SlurmConfig)
    mpi: MpiConfig = placement("of kind mpi", default_factory=MpiConfig)

    @property
    def save_lead_s(self) -> int | None:
        """Seconds before the time limit at which the cluster asks for a checkpoint; None: it does not ask."""
        section = CLUSTER_KINDS[self.kind].section
        return getattr(getattr(self, section), "signal_lead", None) if section else None
