"""Checks of Slurm for the user of this host, and the check of N nodes in a job (`doctor --nodes N`)."""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmscale.base.env import scrubbed
from lmscale.base.errors import ConfigError, LmscaleError
from lmscale.base.units import show_seconds
from lmscale.config.cluster_schema import ClusterConfig
from lmscale_launcher.clusters.job import JobPlan
from lmscale_launcher.doctor.command_result import CommandResult, run_command
from lmscale_launcher.doctor.findings import Finding, fail, ok, warn
from lmscale_launcher.slurm import preflight
from lmscale_launcher.slurm import query as commands
from lmscale_launcher.slurm.partitions import SlurmPartition

_QUEUE_S = 60  # how long to wait for idle nodes
_NODES_TIMEOUT_S = 240.0
ANSWER_S = 15.0  # Slurm's commands give up after 9 to 10 s themselves
_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_CRED_EXPIRE_S = 120  # slurm.conf(5), AuthInfo


def check_nodes(cluster: ClusterConfig, *, nodes: int, folder: Path) -> list[Finding]:
    """Run the check of a node on each of `nodes` idle nodes; takes about 10 s."""
    ranks = cluster.ranks_per_node or cluster.gpus_per_node or 1
    argv = [
        "srun",
        *_options(cluster, nodes),
        sys.executable,
        "-P",
        "-m",
        "lmscale_launcher.doctor.node_probe",
    ]
    env = {**scrubbed(os.environ), **cluster.env}
    answer = run_command([*argv, str(folder), str(ranks)], timeout_s=_NODES_TIMEOUT_S, env=env)
    lines = [line for line in map(_line, answer.out.splitlines()) if line is not None]
    lines.sort(key=lambda line: str(line["host"]))
    findings = [finding for line in lines for finding in _node_findings(line)]
    findings += _fewer_gpus(lines)
    if len(lines) < nodes:
        findings.append(_missing_nodes(answer, len(lines), nodes))
    return findings


def _options(cluster: ClusterConfig, nodes: int) -> list[str]:
    site = cluster.slurm
    named = {
        "partition": site.partition, "account": site.account, "qos": site.qos,
        "reservation": site.reservation, "constraint": site.constraint,
        "exclude": ",".join(site.exclude) or None,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in named.items() if value]
    if cluster.gpus_per_node and site.gpus != "none":
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        gpus = f"{kind}{cluster.gpus_per_node}"
        options.append(f"--gres=gpu:{gpus}" if site.gpus == "gres" else f"--gpus-per-node={gpus}")
    if site.cpus_per_task:
        options.append(f"--cpus-per-task={site.cpus_per_task}")
    return [
        f"--nodes={nodes}", "--ntasks-per-node=1", "--time=5", "--job-name=lmscale-doctor",
        f"--immediate={_QUEUE_S}", "--quiet", *options,
    ]  # fmt: skip


def _line(text: str) -> dict[str, Any] | None:
    try:
        body = json.loads(text)
    except ValueError:
        return None
    return body if isinstance(body, dict) and {"host", "findings"} <= body.keys() else None


def _node_findings(line: dict[str, Any]) -> list[Finding]:
    """The problems of a node, or one line if there are none."""
    findings = [Finding(**finding) for finding in line["findings"]]
    host = line["host"]
    bad = [
        Finding(f.level, f"{host}: {f.what}", f.fact, f.hint) for f in findings if f.level != "ok"
    ]
    gloo = next((f"; gloo: {f.fact}" for f in findings if f.what == "gloo"), "")
    gpus = f"{line['gpus']} GPU(s)" if line["gpus"] else "no GPU"
    return bad or [ok(host, f"{gpus}, no problem{gloo}")]


def _fewer_gpus(lines: list[dict[str, Any]]) -> list[Finding]:
    maximum = max((line["gpus"] for line in lines), default=0)
    hint = "drain the node, see `dmesg | grep Xid`, restart it"
    return [
        fail(f"{line['host']}: GPUs", f"{line['gpus']} GPUs; other nodes have {maximum}", hint)
        for line in lines
        if line["gpus"] < maximum
    ]


def _missing_nodes(answer: CommandResult, answered: int, nodes: int) -> Finding:
    fact = f"{answered} of {nodes} have answered: srun: {answer.failure}"
    hint = "request fewer nodes (`sinfo -t idle` lists idle ones), and check that lmscale has the same path on them"
    return fail("nodes", fact, hint)


def check(env: Mapping[str, str], cluster: ClusterConfig | None) -> list[Finding]:
    """All checks of Slurm. With a `cluster` of kind slurm also whether a job of it could run."""
    bad = warn if cluster is None else fail
    missing = [name for name in _COMMANDS if shutil.which(name, path=env.get("PATH")) is None]
    if len(missing) == len(_COMMANDS) and cluster is None:
        return [ok("slurm", "not available on this host (no sbatch on PATH)")]
    if missing:
        hint = "run this on a login node, `module load slurm`, or install slurm-client"
        return [bad("slurm", f"not on PATH: {', '.join(missing)}", hint)]
    found = [_ignored_variables(env)]
    try:
        found.append(_inside_job(env))
        found += _controller(cluster)
    except LmscaleError as error:
        fact, hint = _fact_and_hint(error)
        found.append(bad("controller", fact, hint))
    return [finding for finding in found if finding is not None]


def settings(text: str) -> dict[str, str]:
    """`scontrol show config` as a mapping."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _controller(cluster: ClusterConfig | None) -> list[Finding]:
    begun = time.monotonic()
    config = commands.ask("scontrol", "show", "config", timeout_s=ANSWER_S)
    seconds = time.monotonic() - begun
    if config.code != 0:
        hint = "`scontrol ping` shows whether it is down; running jobs continue without it"
        return [(fail if cluster else warn)("controller", config.words, hint)]
    values = settings(config.out)
    version = values.get("SLURM_VERSION", "?")
    fact = f"{values.get('ClusterName', '?')}, Slurm {version}, answered in {seconds:.1f} s"
    found = [ok("controller", fact)]
    installed = (
        commands.ask("sbatch", "--version", timeout_s=ANSWER_S).out.strip().rpartition(" ")[2]
    )
    if installed.split(".")[:2] != version.split(".")[:2]:
        hint = (
            "use the commands that the site installed; Slurm supports a difference of two releases"
        )
        found.append(warn("versions", f"commands {installed}, controller {version}", hint))
    partitions = preflight.look()
    found += [_partition(partition) for partition in partitions]
    if not partitions:
        found.append(
            warn(
                "partitions", "none is visible to this user", "ask the administrator of the cluster"
            )
        )
    found += [_accounting(values), _requeue(values, cluster)]
    return found + (_test_job(cluster) if cluster is not None else [])


def _fact_and_hint(error: LmscaleError) -> tuple[str, str]:
    """The fact and the hint of an error of lmscale_launcher.slurm."""
    if isinstance(error, ConfigError):
        return error.problems[0].fact, error.problems[0].hint
    fact, _, hint = str(error).partition("\n  hint: ")
    return fact, hint or "try again later"


def _partition(partition: SlurmPartition) -> Finding:
    usable = sum(node.usable for node in partition.nodes)
    gpus = sorted({node.count_gpus() for node in partition.nodes})
    limit = show_seconds(partition.max_time_s) if partition.max_time_s is not None else "none"
    fact = f"{len(partition.nodes)} node(s)"
    fact += (
        f", {len(partition.nodes) - usable} of them down or drained"
        if usable < len(partition.nodes)
        else ""
    )
    fact += f", {partition.max_nodes} per job at most" if partition.max_nodes is not None else ""
    fact += f", time limit {limit}"
    fact += f", {' or '.join(map(str, gpus))} GPUs per node" if any(gpus) else ", no GPUs"
    fact += ", the default" if partition.default else ""
    what = f"partition {partition.name}"
    if partition.state != "UP":
        hint = "jobs wait there until the administrator opens it"
        return warn(what, f"{fact}; its state is {partition.state}", hint)
    if not usable:
        return warn(what, fact, "`sinfo -R` shows the reason")
    return ok(what, fact)


def _accounting(values: Mapping[str, str]) -> Finding:
    if values.get("AccountingStorageType", "").endswith("none"):
        keep = values.get("MinJobAge", "300 sec")
        return ok(
            "accounting",
            f"none, which lmscale does not need; Slurm forgets ended jobs after {keep}",
        )
    begun = time.monotonic()
    try:
        answer = commands.ask("sacct", "-n", "-X", "-S", "now-1minutes", timeout_s=ANSWER_S)
        problem = "" if answer.code == 0 else answer.words
    except LmscaleError as error:
        problem = _fact_and_hint(error)[0]
    if not problem:
        return ok("accounting", f"sacct answered in {time.monotonic() - begun:.1f} s")
    hint = "lmscale works without it; only the run folder shows then how a job ended"
    return warn("accounting", f"sacct: {problem}", hint)


def _requeue(values: Mapping[str, str], cluster: ClusterConfig | None) -> Finding:
    match = re.search(r"cred_expire=(\d+)", values.get("AuthInfo", ""))
    delay = (int(match[1]) if match else _CRED_EXPIRE_S) + 1
    if values.get("JobRequeue") == "0":
        fact = "off by default (JobRequeue=0); lmscale requests it with --requeue"
        hint = "if the site refuses that, set cluster.slurm.requeue: false (follow-up jobs)"
        level = warn if cluster is None or cluster.slurm.requeue else ok
        return level("requeue", fact, hint)
    hint = (
        "a restart by the scheduler waits that long; a restart in place does not"
        if delay > 30
        else ""
    )
    return ok("requeue", f"allowed; a requeued job starts after {delay} s at least", hint)


def _inside_job(env: Mapping[str, str]) -> Finding | None:
    job = env.get("SLURM_JOB_ID")
    if job is None:
        return None
    answer = commands.ask("squeue", "-h", "-j", job, "-o", "%T", timeout_s=ANSWER_S)
    if answer.code == 0 and answer.out.strip():
        hint = "`lmscale submit` from here works: it removes the variables of this job"
        return ok("this shell", f"runs inside job {job}", hint)
    hint = "open a new shell, or unset them (a tmux session keeps those of its first job)"
    return warn("this shell", f"has SLURM_* variables of job {job}, which is not running", hint)


def _ignored_variables(env: Mapping[str, str]) -> Finding | None:
    names = sorted(name for name in env if name.startswith(("SBATCH_", "SRUN_", "SALLOC_")))
    if not names or "SLURM_JOB_ID" in env:
        return None
    hint = "set what you need in cluster.slurm (partition, account, qos, sbatch: [...])"
    return warn(
        "this shell", f"sets {', '.join(names)}; lmscale submit does not pass them on", hint
    )


def _test_job(cluster: ClusterConfig) -> list[Finding]:
    """Check a job of this shape as `submit` does, also by sbatch --test-only; nothing is queued."""
    from lmscale_launcher.slurm.script import render

    with tempfile.TemporaryDirectory(prefix="lmscale-doctor-") as folder:
        plan = JobPlan(
            name="lmscale-doctor", run_dir=Path(folder), number=1, nodes=cluster.nodes,
            min_nodes=cluster.min_nodes or cluster.nodes,
            ranks_per_node=cluster.ranks_per_node or cluster.gpus_per_node or 1,
            gpus_per_node=cluster.gpus_per_node or 0, workdir=Path.cwd(), python=sys.executable,
            cluster=cluster,
        )  # fmt: skip
        plan.folder.logs.mkdir()
        plan.folder.jobs.mkdir()
        try:
            plan.script.write_text(render(plan))
            preflight.check(plan)
        except ConfigError as error:
            return [
                fail(problem.path or "a job", problem.fact, problem.hint)
                for problem in error.problems
            ]
    return [ok("a job", f"sbatch --test-only accepts one of {cluster.nodes} node(s)")]
