"""Jobs for the tests of the batch script."""

from pathlib import Path
from typing import Any

from lmscale.config.cluster_schema import ClusterConfig
from lmscale_launcher.clusters.job import JobPlan

CORPUS, CACHE = Path("/data/corpus/train"), Path("/local/cache")


def plan(run_dir: Path = Path("/shared/runs/seven"), **changes: Any) -> JobPlan:
    """A job of two nodes with two ranks each; `cluster` holds keys of the run file, the rest of JobPlan."""
    cluster = {"kind": "slurm", "nodes": changes.get("nodes", 2), **changes.pop("cluster", {})}
    values: dict[str, Any] = {
        "name": run_dir.name, "run_dir": run_dir, "number": 1, "nodes": 2, "ranks_per_node": 2,
        "gpus_per_node": 0, "workdir": Path("/home/me/work"), "python": "/opt/venv/bin/python",
        "cluster": ClusterConfig.model_validate(cluster), "paths": (CORPUS, CACHE),
    }  # fmt: skip
    values |= changes
    return JobPlan(min_nodes=values.pop("min_nodes", values["nodes"]), **values)


def plans() -> dict[str, JobPlan]:
    """The jobs of tests/golden/slurm, by name."""
    full = {
        "time_limit": "1d",
        "max_restarts": 5,
        "env": {"NCCL_DEBUG": "INFO"},
        "slurm": {
            "partition": "gpu", "account": "lab's own", "qos": "high", "reservation": "week 12",
            "constraint": "h100|h200", "gpu_type": "h100", "cpus_per_task": 64, "memory": "0",
            "exclusive": True, "exclude": ["gpu[013-014]", "gpu020"], "nodelist": "gpu[001-004]",
            "mpi": "pmix", "signal": "USR1", "signal_lead": 300, "modules": ["cuda/12.4", "gcc"],
            "prolog": ["source '/opt/my site/profile.sh'", "ulimit -l unlimited"],
            "sbatch": ["--comment='a \"b\" #1'", "--mail-user", "me@site.org"],
            "srun": ["--cpu-bind=none", "--label"],
        },
    }  # fmt: skip
    elastic = {"max_restarts": 3, "slurm": {"gpus": "gpus-per-node", "cpus_per_task": 8}}
    rank = {
        "max_restarts": 3,
        "env": {"NCCL_SOCKET_IFNAME": "^lo,docker"},
        "slurm": {"launch": "rank", "cpus_per_task": 4, "mpi": "pmix"},
    }
    pyxis = {"container": {"image": "/images/lmscale 1.sqsh", "mounts": ["/local:/local:rw"]}}
    apptainer = {
        "container": {"kind": "apptainer", "image": "/images/l.sif", "python": "/opt/bin/python"}
    }
    spaces = Path('/shared/runs/50% of "it", $HOME\'s #1')
    return {
        "minimal": plan(),
        "full": plan(cluster=full, gpus_per_node=8, ranks_per_node=8, number=3, env={"A": "b c"}),
        "elastic": plan(cluster=elastic, nodes=4, min_nodes=2, gpus_per_node=4, ranks_per_node=4),
        "rank": plan(cluster=rank),
        "pyxis": plan(cluster={"slurm": pyxis}, gpus_per_node=2),
        "apptainer": plan(cluster={"slurm": apptainer}, gpus_per_node=2),
        "chain": plan(cluster={"slurm": {"requeue": False, "exclude": ["n1"]}, "max_restarts": 2}),
        "odd_names": plan(spaces, workdir=Path("/home/me/a b"), python="/opt/my venv/bin/python"),
    }
