"""From a job to the text of its batch script: options of sbatch and srun, and the filled template.

Pure, but for reading the template, its library, and the names in RUN/bad-nodes.
"""

import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from lmscale.base.errors import ConfigError, Problem
from lmscale.config.cluster_schema import ContainerConfig
from lmscale.config.run_file import cluster_dir
from lmscale.run_folder.bad_nodes import read_bad_nodes
from lmscale_launcher.clusters.job import JobPlan

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
    requeued job waits for as many nodes as before; without, it continues with 3 of 4, and with 4 again.
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


def command(
    plan: JobPlan, *, known: Collection[str] | None = None, how: str = "--parsable"
) -> list[str]:
    """What queues the job: its script alone, or with the nodes to leave out that failed their check.

    `known`: Slurm's names of nodes; None: host names are taken for them.
    """
    bad = ",".join(bad_nodes(plan, known))
    if not bad:
        return ["sbatch", how, str(plan.script)]
    # The command line comes before the script's own options. The script receives the id of the job it
    # follows (none), and the nodes it was queued without, so that new ones are noticed.
    return [
        "sbatch",
        how,
        f"--exclude={','.join([*excluded(plan), bad])}",
        str(plan.script),
        "",
        bad,
    ]


def excluded(plan: JobPlan) -> list[str]:
    """Nodes that the run file leaves out; as for sbatch, the last word has an option that is passed through."""
    passed = passed_through(
        words(plan.cluster.slurm.sbatch, "cluster.slurm.sbatch"), ("-x", "--exclude")
    )
    return [passed] if passed else list(plan.cluster.slurm.exclude)


def bad_nodes(plan: JobPlan, known: Collection[str] | None) -> list[str]:
    """Nodes that failed their check, by Slurm's names: a host name may have a domain, a node's not."""
    found = []
    for host in (bad.host for bad in read_bad_nodes(plan.folder)):
        short = host.partition(".")[0]
        name = host if known is not None and host in known else short
        if (
            known is None or name in known
        ):  # one that has left the cluster would make sbatch refuse the job
            found.append(name)
    return found


_ARRAY_COLUMNS = 96
_PLACEHOLDER = re.compile(r"@\{([^{}]*)\}")  # nothing that bash itself knows


def render(plan: JobPlan, template: str | None = None) -> str:
    """The whole script. Without `template` it is cluster.slurm.template, or cluster/slurm/job.sh.

    Raises ConfigError for a template that has not each placeholder, and for options that cannot be.
    The script sources RUN/jobs/K.lib.sh, a copy of `library()`.
    """
    source = "the template"
    if template is None:
        path = _template(plan)
        template, source = _read(path), str(path)
    return _filled(template, _placeholders(plan), source)


def library() -> str:
    """The decisions that every script sources: cluster/slurm/job_lib.sh."""
    return (cluster_dir() / "slurm" / "job_lib.sh").read_text(encoding="utf-8")


def quoted(text: str) -> str:
    """One word for the shell: bash reads exactly this text back."""
    return shlex.quote(_one_line(text))


def quoted_for_sbatch(word: str) -> str:
    r"""One word of an #SBATCH line, which no shell reads.

    sbatch splits it by itself: blanks count inside of quotes only, a backslash escapes anywhere, # begins
    a comment. Old versions know double quotes only. (22.05, tried with every printable letter.)
    """
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", word, re.ASCII):
        return word
    word = _one_line(word)
    return '"' + re.sub(r"([\"'\\#])", r"\\\1", word) + '"'


def _one_line(text: str) -> str:
    """The run file's check refuses such letters; paths may still hold them, and would end an #SBATCH line."""
    if text.isprintable():
        return text
    hint = "a batch script needs names of one plain line; rename the folder, or run it from another"
    raise ConfigError([Problem("", f"{text!r} holds a control character", hint)])


def _placeholders(plan: JobPlan) -> dict[str, str]:
    """The text for each placeholder."""
    return {
        "sbatch": _directives(sbatch_options(plan)),
        "values": _values(plan),
        "library": quoted(str(plan.library)),
        "srun": _array(srun_options(plan)),
        "command": _array(_command(plan)),
        "setup": _setup(plan),
        "exports": _exports(plan),
    }


def _values(plan: JobPlan) -> str:
    """Assignments of what the library reads, one per line with its meaning."""
    slurm, limit = plan.cluster.slurm, plan.cluster.time_limit
    values = (
        ("run", quoted(str(plan.run_dir)), ""),
        ("number", str(plan.number), "of this submission in the run folder"),
        ("script", quoted(str(plan.script)), "this file; follow-up jobs are queued with it"),
        ("launch", slurm.launch, "srun starts one supervisor per node, or one task per rank"),
        ("ranks_per_node", str(plan.ranks_per_node), ""),
        ("requeue", "yes" if slurm.requeue else "no", "no: continue in follow-up jobs"),
        ("excluded", quoted(",".join(excluded(plan))), "nodes that the run file excludes"),
        ("signal", slurm.signal, "sent by Slurm before the time limit"),
        ("signal_lead", str(slurm.signal_lead), "seconds before it"),
        ("time_limit", "" if limit is None else str(limit), "seconds; empty: none in the run file"),
        ("max_restarts", str(plan.cluster.max_restarts), "without a newer checkpoint"),
    )
    return "\n".join(
        f"{name}={value}  # {meaning}" if meaning else f"{name}={value}"
        for name, value, meaning in values
    )


def _filled(template: str, values: Mapping[str, str], source: str) -> str:
    found = _PLACEHOLDER.findall(template)
    unknown = sorted({name for name in found if name not in values})
    missing = [name for name in values if name not in found]
    if "requeue" in found and "library" not in found:
        fact = f"{source} is a copy of job.sh of an earlier version, which contained the decisions itself"
        hint = (
            f"copy {cluster_dir() / 'slurm' / 'job.sh'} again and move your own lines into the site's part: "
            "the decisions are in a library now"
        )
        raise ConfigError([Problem("cluster.slurm.template", fact, hint)])
    if unknown or missing:
        facts = [f"{source} has the unknown @{{{name}}}" for name in unknown]
        facts += [f"{source} lacks @{{{name}}}" for name in missing]
        hint = f"compare it with {cluster_dir() / 'slurm' / 'job.sh'}, or copy that again"
        raise ConfigError([Problem("cluster.slurm.template", fact, hint) for fact in facts])
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _template(plan: JobPlan) -> Path:
    given = plan.cluster.slurm.template
    if given is None:
        return cluster_dir() / "slurm" / "job.sh"
    return plan.workdir / os.path.expanduser(given)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fact = f"{path} cannot be read ({error})"
        hint = "name a copy of cluster/slurm/job.sh, or leave it out"
        raise ConfigError([Problem("cluster.slurm.template", fact, hint)]) from error


def _command(plan: JobPlan) -> list[str]:
    slurm = plan.cluster.slurm
    if slurm.container is not None:
        plan = replace(plan, python=slurm.container.python)
    command = plan.command if slurm.launch == "node" else plan.rank_command
    return [*container_command(plan), *command]


def _directives(options: Sequence[str]) -> str:
    """A line for each option; a word that begins without a dash is the value of the one before it."""
    lines: list[str] = []
    for option in options:
        word = quoted_for_sbatch(option)
        if option.startswith("-") or not lines:
            lines.append(f"#SBATCH {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _array(options: Iterable[str]) -> str:
    """The elements of a bash array, in lines of at most 100 columns where the words allow it."""
    lines = [""]
    for word in map(quoted, options):
        if len(lines[-1]) + len(word) > _ARRAY_COLUMNS or not lines[-1]:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines) + "\n"


def _setup(plan: JobPlan) -> str:
    """Prolog commands and modules. Where one fails by itself there is nothing to train with: 78, no other start."""
    slurm = plan.cluster.slurm
    commands = [words([entry], "cluster.slurm.prolog") for entry in slurm.prolog]
    commands += [
        ["module", "load", *words([entry], "cluster.slurm.modules")] for entry in slurm.modules
    ]
    lines = []
    for command in filter(None, commands):
        text = shlex.join(command)
        lines.append(f"{text} || unprepared $? {quoted(text)}")
    return "\n".join(lines) or "# nothing is set: cluster.slurm.prolog, cluster.slurm.modules"


def _exports(plan: JobPlan) -> str:
    """In launch: node the supervisors add cluster.env themselves, as they do on any kind of cluster."""
    env = dict(plan.env)
    if plan.cluster.slurm.launch == "rank":
        env |= plan.cluster.env
        env.setdefault("OMP_NUM_THREADS", str(plan.cluster.slurm.cpus_per_task or 1))
    return "\n".join(f"export {name}={quoted(value)}" for name, value in env.items()) or "# nothing"


def passed_through(options: Sequence[str], names: Sequence[str]) -> str | None:
    """The value of the last of these options of sbatch that a user passes through; None without one."""
    found = None
    for index, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name in names:
            found = value if equals else " ".join(options[index + 1 : index + 2])
        else:
            for short in (name for name in names if len(name) == 2 and option.startswith(name)):
                found = option.removeprefix(short).strip()
    return found
