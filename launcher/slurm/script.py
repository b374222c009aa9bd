"""From a job to the text of its batch script. Pure, but for reading the template."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.jobs.plan import JobPlan
from launcher.slurm.command_line import excluded
from launcher.slurm.options import container_command, sbatch_options, srun_options, words
from lmscale.config.places import cluster_dir
from lmscale.errors import ConfigError, Problem

_PLACEHOLDER = re.compile(r"@\{([^{}]*)\}")  # nothing that bash itself knows


def render(plan: JobPlan, template: str | None = None) -> str:
    """The whole script. Without `template` it is cluster.slurm.template, or cluster/slurm/job.sh.

    Raises ConfigError for a template that has not each placeholder, and for options that cannot be.
    The script writes K.chain, ids of follow-up jobs, and K.tries, its count of starts, beside RUN/jobs/K.sh.
    """
    source = "the template"
    if template is None:
        path = _template(plan)
        template, source = _read(path), str(path)
    return _filled(template, _values(plan), source)


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


def _values(plan: JobPlan) -> dict[str, str]:
    """What stands for each placeholder."""
    slurm, limit = plan.cluster.slurm, plan.cluster.time_limit
    return {
        "sbatch": _directives(sbatch_options(plan)),
        "run_dir": quoted(str(plan.run_dir)),
        "number": str(plan.number),
        "script": quoted(str(plan.script)),
        "launch": slurm.launch,
        "ranks_per_node": str(plan.ranks_per_node),
        "requeue": "yes" if slurm.requeue else "no",
        "excluded": quoted(",".join(excluded(plan))),
        "signal": slurm.signal,
        "signal_lead": str(slurm.signal_lead),
        "time_limit": "" if limit is None else str(limit),
        "max_restarts": str(plan.cluster.max_restarts),
        "srun": _array(srun_options(plan)),
        "command": _array(_command(plan)),
        "setup": _setup(plan),
        "exports": _exports(plan),
    }


def _filled(template: str, values: Mapping[str, str], source: str) -> str:
    found = _PLACEHOLDER.findall(template)
    unknown = sorted({name for name in found if name not in values})
    missing = [name for name in values if name not in found]
    if unknown or missing:
        facts = [f"{source} has the unknown @{{{name}}}" for name in unknown]
        facts += [f"{source} lacks @{{{name}}}" for name in missing]
        hint = (
            f"compare it with {cluster_dir() / 'slurm' / 'job.sh'}, and copy that anew if in doubt"
        )
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
    return "".join(f"\n    {quoted(option)}" for option in options) + "\n"


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
