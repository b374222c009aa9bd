"""`doctor --nodes N`: the check of a node, run on N nodes of a Slurm cluster in a job of its own."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from launcher.doctor.ask import Answer, ask
from launcher.doctor.finding import Finding, fail, ok
from launcher.jobs.environment import scrubbed
from lmscale.config.cluster import ClusterConfig

_QUEUE_S = 60  # how long to wait for idle nodes
_ANSWER_S = 240.0


def check_nodes(cluster: ClusterConfig, *, nodes: int, folder: Path) -> list[Finding]:
    """Start one task a node, and tell what is wrong where. Takes idle nodes for about 10 s."""
    ranks = cluster.ranks_per_node or cluster.gpus_per_node or 1
    argv = ["srun", *_options(cluster, nodes), sys.executable, "-P", "-m", "launcher.doctor.meet"]
    env = {**scrubbed(os.environ), **cluster.env}
    answer = ask([*argv, str(folder), str(ranks)], timeout_s=_ANSWER_S, env=env)
    seen = [line for line in map(_line, answer.out.splitlines()) if line is not None]
    found = [one for line in sorted(seen, key=lambda line: str(line["host"])) for one in _of(line)]
    found += _siblings(seen)
    if len(seen) < nodes:
        found.append(_silent(answer, len(seen), nodes))
    return found


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
        asked = f"{kind}{cluster.gpus_per_node}"
        options.append(f"--gres=gpu:{asked}" if site.gpus == "gres" else f"--gpus-per-node={asked}")
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


def _of(line: dict[str, Any]) -> list[Finding]:
    """What is not well on a node; if all is, that."""
    found = [Finding(**one) for one in line["findings"]]
    host = line["host"]
    bad = [Finding(f.level, f"{host}: {f.what}", f.fact, f.hint) for f in found if f.level != "ok"]
    met = next((f"; gloo: {f.fact}" for f in found if f.what == "gloo"), "")
    gpus = f"{line['gpus']} GPU(s)" if line["gpus"] else "no GPU"
    return bad or [ok(host, f"{gpus}, all well{met}")]


def _siblings(seen: list[dict[str, Any]]) -> list[Finding]:
    most = max((line["gpus"] for line in seen), default=0)
    hint = "drain the node, see `dmesg | grep Xid`, restart it"
    return [
        fail(f"{line['host']}: GPUs", f"{line['gpus']}, while its siblings have {most}", hint)
        for line in seen
        if line["gpus"] < most
    ]


def _silent(answer: Answer, seen: int, nodes: int) -> Finding:
    fact = f"{seen} of {nodes} have answered: srun: {answer.words}"
    hint = "ask for fewer nodes (idle: `sinfo -t idle`); is lmscale at the same path on them?"
    return fail("nodes", fact, hint)
