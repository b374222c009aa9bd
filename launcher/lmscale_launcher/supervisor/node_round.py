"""One round on this node: its ranks, or the staging of its data. No process of it outlives the round."""

import os
import signal
import socket
import time
from contextlib import suppress

from lmscale.base.proc import children
from lmscale.run_folder.events import events_path
from lmscale_launcher.supervisor.context import SupervisorContext, SupervisorJob
from lmscale_launcher.supervisor.protocol import Round, SupervisorGroup
from lmscale_launcher.supervisor.rank_process import RankProcess, spawn
from lmscale_launcher.supervisor.watchdog import Watchdog


def run_round(
    context: SupervisorContext,
    this_round: Round,
    group: SupervisorGroup,
    listener: socket.socket | None = None,
) -> dict[int, int]:
    """Run the round on this node, from its first process to its last; the exit code of each rank.

    Rank 0 inherits the `listener`. The copy of this process is closed then, so that peers of rank 0 notice
    its death as a closed port.
    """
    job, processes = context.job, list[RankProcess]()
    log = events_path(job.folder, this_round.start).stem
    context.output.open_logs(job.folder.logs, log, job.topology.ranks)
    try:
        for rank in _ranks_to_start(job, this_round):
            processes.append(_spawn(context, this_round, rank, listener))
            context.guard.add(processes[-1].pid)
        if listener is not None:
            listener.close()
        return Watchdog(processes, group, context).run()
    finally:
        for process in processes:
            if process.process.returncode is None:
                process.reap()
            process.close()
        kill_orphans(spare={context.guard.pid})


def _ranks_to_start(job: SupervisorJob, this_round: Round) -> range:
    """The ranks to start; the process that stages data has the number of the first one."""
    ranks = job.topology.ranks
    if this_round.kind == "ranks":
        return ranks
    return ranks[:1] if job.stage is not None else ranks[:0]


def _spawn(
    context: SupervisorContext, this_round: Round, rank: int, listener: socket.socket | None
) -> RankProcess:
    job = context.job
    terminal = context.terminal if rank == 0 else None
    if this_round.kind == "stage":
        assert job.stage is not None
        env = {**job.env, "LMSCALE_START": this_round.start}
        return spawn(job.stage, env, rank=rank, terminal=terminal, shares_progress=False)
    env = job.topology.environment(job.env, rank=rank, port=this_round.port, start=this_round.start)
    ranked = job.topology.ranked
    return spawn(
        job.command,
        env,
        rank=rank,
        terminal=terminal,
        shares_progress=ranked,
        listener=listener if rank == 0 and ranked else None,
    )


def kill_orphans(*, spare: set[int], within_s: float = 5.0) -> None:
    """Kill and reap every other child of this process: what ranks have started outside of their groups.

    A process that waits for a hung file server does not die before the server answers; after `within_s` it
    is left.
    """
    deadline = time.monotonic() + within_s
    while (
        time.monotonic() < deadline
    ):  # the children of a killed process become children of this one
        pids = children() - spare
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)
