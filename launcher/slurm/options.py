"""The options of sbatch and srun for a job: our keys in Slurm's words. Pure."""

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath

from launcher.jobs.plan import JobPlan
from lmscale.config.cluster import ContainerConfig
from lmscale.errors import ConfigError, Problem

# What the script and `status`, `logs` and `stop` rely on, and where to say it instead.
_OURS = {
    ("-a", "--array"): "every task of an array would be a start of the same run; submit runs one by one",
    ("-o", "--output"): "the log is RUN/logs/job-K.log, where `lmscale logs` looks",
    ("-e", "--error"): "the log is RUN/logs/job-K.log, where `lmscale logs` looks",
    ("", "--open-mode"): "the log of all starts is one file, appended to",
    ("-D", "--chdir"): "the job works in the folder that it is submitted from",
    ("-N", "--nodes"): "use cluster.nodes and cluster.min_nodes",
    ("-n", "--ntasks"): "use cluster.ranks_per_node",
    ("", "--ntasks-per-node"): "use cluster.ranks_per_node",
    ("", "--signal"): "use cluster.slurm.signal and cluster.slurm.signal_lead",
    ("", "--requeue"): "use cluster.slurm.requeue",
    ("", "--no-requeue"): "use cluster.slurm.requeue",
    ("", "--wrap"): "the job runs its own script",
    ("-W", "--wait"): "submit does not wait; `lmscale status --watch` does",
    ("-M", "--clusters"): "status and stop would ask this cluster, where its id is another job's; submit there",
}  # fmt: skip


def sbatch_options(plan: JobPlan) -> list[str]:
    """What stands in the #SBATCH lines, word by word, unquoted. Raises ConfigError."""
    slurm = plan.cluster.slurm
    options = [f"--job-name={plan.name}", *_size(plan), *_gpus(plan)]
    if slurm.memory:
        options.append(f"--mem={slurm.memory}")
    for name in ("partition", "account", "qos", "reservation", "constraint"):
        if value := getattr(slurm, name):
            options.append(f"--{name}={value}")
    if slurm.exclusive:
        options.append("--exclusive")
    for name in ("exclude", "nodelist"):
        if hosts := getattr(slurm, name):
            options.append(f"--{name}={','.join(hosts)}")
    if plan.cluster.time_limit is not None:
        options.append(f"--time={_duration(plan.cluster.time_limit)}")
    options += [
        f"--signal=B:{slurm.signal}@{slurm.signal_lead}",
        "--requeue" if slurm.requeue else "--no-requeue",
        f"--chdir={plan.workdir}",
        f"--output={_file_pattern(plan.log)}",
        "--open-mode=append",
    ]
    return [*options, *_passed_on(slurm.sbatch)]


def srun_options(plan: JobPlan) -> list[str]:
    """The options of the one srun, without the counts that only the running job knows."""
    slurm = plan.cluster.slurm
    # A site or a user may have asked sbatch for --export=NONE; ranks need what the script exports.
    options = ["--export=ALL"]
    if slurm.launch == "node":
        options.append("--kill-on-bad-exit=0")  # supervisors agree, and leave together
    else:
        options += ["--kill-on-bad-exit=1", "--label"]
    cpus = slurm.cpus_per_task
    if cpus is None and slurm.launch == "rank" and plan.min_nodes < plan.nodes:
        cpus = 1  # the job asks for the cores of all ranks of a node as those of one task
    if cpus is not None:  # not inherited from sbatch since 22.05
        options.append(f"--cpus-per-task={cpus}")
    if slurm.mpi:
        options.append(f"--mpi={slurm.mpi}")
    if slurm.container is not None and slurm.container.kind == "pyxis":
        options += [
            f"--container-image={slurm.container.image}",
            f"--container-mounts={','.join(mounts(plan))}",
            f"--container-workdir={plan.workdir}",
        ]
    return [*options, *words(slurm.srun, "cluster.slurm.srun")]


def container_command(plan: JobPlan) -> list[str]:
    """What stands before the interpreter of a task: apptainer, or nothing."""
    container = plan.cluster.slurm.container
    if container is None or container.kind != "apptainer":
        return []
    binds = [word for mount in mounts(plan) for word in ("--bind", mount)]
    nvidia = ["--nv"] if plan.gpus_per_node else []
    return ["apptainer", "exec", *nvidia, *binds, "--pwd", str(plan.workdir), container.image]


def mounts(plan: JobPlan) -> list[str]:
    """SOURCE:TARGET of all that a container must see, the site's own first.

    A folder inside one that is mounted already is left out: so a site can mount a node's local
    disk, on which data.cache_dir does not stand before the job has made it. Raises ConfigError.
    """
    container = plan.cluster.slurm.container
    given = list(container.mounts) if isinstance(container, ContainerConfig) else []
    targets = [PurePath(mount.split(":")[min(1, mount.count(":"))]) for mount in given]
    for path in sorted({plan.run_dir, plan.workdir, *plan.paths}):
        if any(path.is_relative_to(target) for target in targets):
            continue
        if ":" in str(path) or "," in str(path):
            fact = f"{path} has a colon or a comma in its name, which no mount can name"
            raise ConfigError([Problem("cluster.slurm.container", fact, "use another folder")])
        given.append(f"{path}:{path}")
        targets.append(path)
    return given


def words(entries: Sequence[str], key: str) -> list[str]:
    """Entries of a run file as words, by the shell's rules for quotes. Nothing is expanded."""
    found: list[str] = []
    for entry in entries:
        try:
            found += shlex.split(entry)
        except ValueError as error:
            raise ConfigError(
                [Problem(key, f"{entry!r}: {error}", "close the quote, or put a \\ before it")]
            ) from error
    return found


def _size(plan: JobPlan) -> list[str]:
    """Nodes, and cores of each.

    Without a fixed number of nodes no tasks are asked for, only nodes. Measured on 22.05: with
    --ntasks-per-node the first start fixes the number of tasks, and after the loss of a node the
    requeued job waits for as many nodes as before; without, it goes on with 3 of 4, and with 4 again.
    """
    slurm = plan.cluster.slurm
    tasks = 1 if slurm.launch == "node" else plan.ranks_per_node
    cpus = slurm.cpus_per_task
    if plan.min_nodes < plan.nodes:
        options = [f"--nodes={plan.min_nodes}-{plan.nodes}"]
        if cpus is not None or tasks > 1:
            options.append(f"--cpus-per-task={tasks * (cpus or 1)}")
        return options
    options = [f"--nodes={plan.nodes}", f"--ntasks-per-node={tasks}"]
    return options if cpus is None else [*options, f"--cpus-per-task={cpus}"]


def _gpus(plan: JobPlan) -> list[str]:
    slurm, count = plan.cluster.slurm, plan.gpus_per_node
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    if not count or slurm.gpus == "none":
        return []
    return [
        f"--gres=gpu:{kind}{count}" if slurm.gpus == "gres" else f"--gpus-per-node={kind}{count}"
    ]


def _duration(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02}:{minute:02}:{second:02}"


def _file_pattern(path: Path) -> str:
    r"""A file name in which sbatch replaces nothing: %% is a %; a \ ends all replacing (22.05)."""
    text = str(path)
    return text.replace("\\", "\\\\") if "\\" in text else text.replace("%", "%%")


def _passed_on(entries: Sequence[str]) -> list[str]:
    found = words(entries, "cluster.slurm.sbatch")
    for word in found:
        for (short, long), hint in _OURS.items():
            glued = short and word.startswith(short) and not word.startswith("--")
            if glued or word.partition("=")[0] == long:
                raise ConfigError(
                    [Problem("cluster.slurm.sbatch", f"{word!r} is set here already", hint)]
                )
    return found
