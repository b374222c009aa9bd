"""A new cluster kind takes two files: one module, and its row and section in the schema (docs/extending.md)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

MODULE = """
from lmscale_launcher.clusters.base import Cluster, JobState


class ToyCluster(Cluster):
    poll_interval_s = 5.0
    confirms_job_end = True
    nodes_are_like_this_host = False

    def runs_on_this_host_only(self, cluster):
        return False

    def preview(self, plan):
        return f"toy queue={plan.cluster.toy.queue} {plan.nodes}\\n"

    def submit(self, plan):
        raise NotImplementedError

    def states(self, jobs):
        return [JobState("pending", "in the toy queue") for _ in jobs]

    def cancel(self, folder, record):
        pass

    def withdraw(self, folder, record):
        return True
"""
ROW = '    "toy": ClusterKind("lmscale_launcher.clusters.toy", "ToyCluster", section="toy", ends_jobs=True),\n'
FIRST_ROW = '    "local": ClusterKind('
SECTION = '''class ToyConfig(Section):
    """Settings of kind toy."""

    queue: str = placement("name of the queue", default="all")
    signal_lead: Seconds = placement("seconds before the time limit", default=60, ge=1)


'''
FIRST_CLASS = "class ClusterKind(NamedTuple):"
FIELD = '    toy: ToyConfig = placement("of kind toy", default_factory=ToyConfig)\n'
FIRST_FIELD = "    mpi: MpiConfig = "
USE = """
import os, sys
from pathlib import Path

import lmscale, lmscale_launcher
from lmscale.base.errors import ConfigError
from lmscale.config.run_file import load
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.jobs.job_plan import plan_job
from lmscale_launcher.planner.topology import available_host_bytes, planned_topology

root = Path(sys.argv[1])
for package in (lmscale, lmscale_launcher):
    assert Path(package.__file__).is_relative_to(root), package.__file__
keys = ["cluster.kind=toy", "cluster.nodes=2", "cluster.toy.queue=gpu", "cluster.time_limit=1h",
        "train.run_dir=" + str(root / "run")]
cfg = load("smoke", [*keys, "cluster.ranks_per_node=1"], cwd=root)
plan = plan_job(cfg, number=1, cwd=root)
print(cluster_of("toy").preview(plan), end="")
topology = planned_topology(cfg, os.environ)
assert (topology.nodes, available_host_bytes(topology, cfg)) == (2, None)
for refused in (keys, [*keys, "cluster.ranks_per_node=1", "cluster.time_limit=30"]):
    try:
        plan_job(load("smoke", refused, cwd=root), number=1, cwd=root)
    except ConfigError as error:
        print(error.problems[0].path, error.problems[0].fact)
assert "torch" not in sys.modules
"""


def _insert(path: Path, text: str, *, before: str) -> None:
    head, mark, tail = path.read_text().partition(before)
    assert mark, f"{path} does not contain {before!r}"
    path.write_text(head + text + mark + tail)


def test_a_new_cluster_kind_is_one_module_and_one_section_of_the_schema(tmp_path: Path) -> None:
    for name in ("lmscale", "launcher", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    schema = tmp_path / "lmscale" / "config" / "cluster_schema.py"
    _insert(schema, ROW, before=FIRST_ROW)
    _insert(schema, SECTION, before=FIRST_CLASS)
    _insert(schema, FIELD, before=FIRST_FIELD)
    module = tmp_path / "launcher" / "lmscale_launcher" / "clusters" / "toy.py"
    module.write_text(MODULE)

    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{tmp_path / 'launcher'}"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    preview, unknown_ranks, short_limit = done.stdout.splitlines()
    assert preview == "toy queue=gpu 2"
    assert unknown_ranks == "cluster.ranks_per_node unknown for the nodes of kind toy"
    assert short_limit.startswith("cluster.time_limit 30 s, and cluster.toy.signal_lead requests")
