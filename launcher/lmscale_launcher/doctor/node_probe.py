"""A program that `doctor --nodes` starts on each node: it checks the node and connects to the others by gloo.

`srun ... python -P -m lmscale_launcher.doctor.node_probe FOLDER RANKS` prints one line of JSON per node.
"""

import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmscale.base.env import scrubbed
from lmscale_launcher.command_line import lmscale_command
from lmscale_launcher.doctor.command_result import run_command
from lmscale_launcher.doctor.findings import Finding, fail, ok
from lmscale_launcher.doctor.node import inspect_node
from lmscale_launcher.doctor.probes import connection_problem

_ANSWER_S = 90.0  # torch from a cold file server, then 30 s for the other nodes


def main(argv: list[str]) -> int:
    """Check and connect; the result is in the printed line, so the exit code is 0."""
    node = inspect_node(Path(argv[0]), ranks=int(argv[1]))
    findings = [*node.findings, *_connect(os.environ)]
    body: dict[str, Any] = {"host": socket.gethostname(), "gpus": node.num_gpus}
    body["findings"] = [asdict(finding) for finding in findings]
    sys.stdout.write(json.dumps(body) + "\n")
    return 0


def _connect(env: Mapping[str, str]) -> list[Finding]:
    size = int(env.get("SLURM_NTASKS", "1"))
    if size == 1:
        return []
    from lmscale_launcher.slurm.states import expand

    first = expand(env["SLURM_STEP_NODELIST"])[0]
    port = 20_000 + int(env["SLURM_JOB_ID"]) % 10_000
    ranks = {
        "RANK": env["SLURM_PROCID"], "WORLD_SIZE": str(size), "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": first, "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    result = run_command(
        lmscale_command("probe", "gloo"), timeout_s=_ANSWER_S, env={**scrubbed(env), **ranks}
    )
    if not result.succeeded:
        hint = (
            "set cluster.env.GLOO_SOCKET_IFNAME to the interface of the cluster's network, and check "
            "that nodes may connect to each other on any port (SrunPortRange does not cover them)"
        )
        return [
            fail("gloo", f"cannot connect to the other nodes: {connection_problem(result)}", hint)
        ]
    addresses = ", ".join(json.loads(result.out.splitlines()[-1])["listens_on"])
    return [ok("gloo", f"{size} nodes connected, at {addresses}")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
