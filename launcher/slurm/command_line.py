"""The command line of sbatch for a job. Pure, but for the names in RUN/bad-nodes."""

from collections.abc import Collection

from launcher.jobs.plan import JobPlan
from launcher.slurm.options import words
from launcher.slurm.partition import passed_through
from lmscale.run.bad_nodes import read_bad_nodes


def command(
    plan: JobPlan, *, known: Collection[str] | None = None, how: str = "--parsable"
) -> list[str]:
    """What queues the job: its script alone, or with the nodes to leave out that failed their check.

    `known`: Slurm's names of nodes; None: host names are taken for them.
    """
    bad = ",".join(bad_nodes(plan, known))
    if not bad:
        return ["sbatch", how, str(plan.script)]
    # The command line comes before the script's own options. The script is told which job it
    # follows (none), and which nodes it was queued without, so that it knows of new ones.
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
