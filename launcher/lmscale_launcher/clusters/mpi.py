"""Kind `mpi`: Open MPI's mpirun on this host or on a list of hosts, in the background.

As a program (`python -m lmscale_launcher.clusters.mpi RUN/jobs/K.yaml`) it runs in the background: the supervisor
that starts mpirun and, within cluster.max_restarts, starts it again.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from typing_extensions import override

from lmscale.base.errors import ConfigError, LmscaleError, Problem
from lmscale.config.cluster_schema import ClusterConfig
from lmscale_launcher.clusters import background
from lmscale_launcher.clusters.background import BackgroundCluster
from lmscale_launcher.clusters.base import RankLauncher
from lmscale_launcher.clusters.job import JobPlan, JobRecord
from lmscale_launcher.jobs.job_plan import plan_job

# Of the environment of this host, mpirun hands nothing to ranks on others but what -x names.
_PASSED_ON = ("LMSCALE_START", "PYTHONPATH", "PYTHONUNBUFFERED", "OMP_NUM_THREADS")


class MpiCluster(BackgroundCluster):
    """mpirun. The pid of its supervisor names the job."""

    reports_all_hosts = (
        False  # of an mpirun with a host file only the host of its supervisor is known
    )
    tool = "mpi"

    @override
    def runs_on_this_host_only(self, cluster: ClusterConfig) -> bool:
        return cluster.nodes == 1 and not cluster.mpi.hosts

    @override
    def rank_launcher(self, cluster: ClusterConfig) -> RankLauncher | None:
        return RankLauncher("cluster.kind mpi", "kind slurm or local")

    @override
    def preview(self, plan: JobPlan) -> str:
        return (
            f"{background.preview(plan, _supervisor(plan))}"
            f"# it runs, and within cluster.max_restarts={plan.cluster.max_restarts} runs again:\n"
            f"{_assignments(plan.cluster.env)}{shlex.join(mpirun(plan, os.environ))}\n"
        )

    @override
    def submit(self, plan: JobPlan) -> JobRecord:
        mpirun(plan, os.environ)  # errors in hosts or mpirun are reported here, not only in the log
        record = background.start(plan, _supervisor(plan), os.environ)
        hosts = [host.partition(":")[0] for host in plan.cluster.mpi.hosts]
        return replace(record, facts={**record.facts, "hosts": hosts}) if hosts else record


def mpirun(plan: JobPlan, env: Mapping[str, str]) -> list[str]:
    """The command line of Open MPI's mpirun. Raises ConfigError."""
    mpi, on_each = plan.cluster.mpi, plan.ranks_per_node
    words = [_program(plan, env), "-n", str(plan.nodes * on_each)]
    if mpi.hosts:
        if len(mpi.hosts) != plan.nodes:
            fact = f"{len(mpi.hosts)} hosts for cluster.nodes={plan.nodes}"
            raise ConfigError([Problem("cluster.mpi.hosts", fact, "list one host a node")])
        slots = [host if ":" in host else f"{host}:{on_each}" for host in mpi.hosts]
        words += ["--host", ",".join(slots)]
        given = [name for name in _PASSED_ON if name in env or name.startswith(("LM", "PYTHONU"))]
        words += [word for name in (*given, *plan.cluster.env) for word in ("-x", name)]
    elif not mpi.options:
        if plan.nodes > 1:
            fact = f"{plan.nodes}, but without cluster.mpi.hosts mpirun starts ranks on this host alone"
            hint = "list the hosts, or name a hostfile: cluster.mpi.options=['--hostfile', FILE]"
            raise ConfigError([Problem("cluster.nodes", fact, hint)])
        words += ["--host", f"localhost:{on_each}"]
    # mpirun would bind each rank to one core: its loader and its threads need more.
    words += ["--map-by", f"ppr:{on_each}:node", "--bind-to", "none"]
    if os.geteuid() == 0:
        words.append("--allow-run-as-root")
    return [*words, *mpi.options, *plan.rank_command]


def supervised(config: Path) -> int:
    """Run the job of RUN/jobs/K.yaml to its end, as `lmscale train` does with ranks of its own."""
    from lmscale.config.run_file import load
    from lmscale.run_folder.events import start_name
    from lmscale_launcher.supervisor.context import SupervisorJob
    from lmscale_launcher.supervisor.rank_process import NodeTopology
    from lmscale_launcher.supervisor.supervisor import supervise

    cfg = load(config)
    plan = plan_job(cfg, number=int(config.stem), cwd=Path.cwd())
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **cfg.cluster.env}
    job = SupervisorJob(
        command=mpirun(plan, env),
        folder=plan.folder,
        topology=NodeTopology(1, ranked=False),
        start=start_name(env),
        by_hand=False,
        max_restarts=cfg.cluster.max_restarts,
        env=env,
        fresh="LMSCALE_FRESH" in env,
    )
    return supervise(job)


def main(argv: Sequence[str]) -> int:
    """The program: prints errors as text and returns mpirun's exit code."""
    try:
        return supervised(Path(argv[0]))
    except LmscaleError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(error.exit_code)


def _supervisor(plan: JobPlan) -> list[str]:
    return [plan.python, "-P", "-m", "lmscale_launcher.clusters.mpi", str(plan.config)]


def _program(plan: JobPlan, env: Mapping[str, str]) -> str:
    """mpirun of the environment that lmscale is installed in, which its mpi4py belongs to; else of PATH."""
    beside = Path(plan.python).with_name("mpirun")
    found = str(beside) if beside.is_file() else shutil.which("mpirun", path=env.get("PATH"))
    if found is None:
        hint = "pip install 'lmscale[mpi]', or load the site's module of Open MPI"
        raise ConfigError([Problem("cluster.kind", "mpi, but there is no mpirun in PATH", hint)])
    return found


def _assignments(env: Mapping[str, str]) -> str:
    return "".join(f"{name}={shlex.quote(text)} " for name, text in env.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
