"""The verbs around submitted jobs, as typer takes them. What they do is imported when it is needed."""

from typing import Annotated

import typer

from lmscale_launcher.cli_options import Cluster, DryRun, Json, Overrides, Run, RunDir, with_cluster


def submit(
    run: Run,
    overrides: Overrides = None,
    cluster: Cluster = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Start a run in the background: on this host, under mpirun, or in a queue of Slurm."""
    from lmscale_launcher.jobs.submit import submit as run_submit

    _configure_log()
    given = with_cluster(overrides, cluster)
    raise typer.Exit(run_submit(run, given, dry_run=dry_run, as_json=as_json))


def status(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run folder, or its name in runs/; all without."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Draw it again and again.")] = False,
    as_json: Json = False,
) -> None:
    """Say how a run stands, or all runs under runs/."""
    from lmscale_launcher.jobs.status import status as run_status

    raise typer.Exit(run_status(run, watch=watch, as_json=as_json))


def logs(
    run: RunDir,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Of one rank only.")] = None,
    as_json: Json = False,
) -> None:
    """Print what the ranks of a run have said."""
    from lmscale_launcher.jobs.logs import logs as run_logs

    raise typer.Exit(run_logs(run, follow=follow, rank=rank, as_json=as_json))


def stop(
    run: RunDir,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without saving.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a run to save and stop, and wait for it. Only `resume`, or `train` by hand, starts it again."""
    from lmscale_launcher.jobs.stop import stop as run_stop

    raise typer.Exit(run_stop(run, now=now, as_json=as_json))


def resume(
    run: RunDir,
    overrides: Overrides = None,
    cluster: Cluster = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Submit a run again that was stopped, has failed or was cancelled: from its newest checkpoint."""
    from lmscale_launcher.jobs.resume import resume as run_resume

    _configure_log()
    given = with_cluster(overrides, cluster)
    raise typer.Exit(run_resume(run, given, dry_run=dry_run, as_json=as_json))


def _configure_log() -> None:
    from lmscale.base.log import configure
    from lmscale.base.world import World

    configure(World())
