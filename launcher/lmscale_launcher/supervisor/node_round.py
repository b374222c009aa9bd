"""What runs on this node in one round: its ranks, or what stages its data. Nothing of it outlives the round.

The one selector of a supervisor: output of ranks, connections and signals all wake the same loop.
"""

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


def run(
    station: SupervisorContext,
    one: Round,
    team: SupervisorGroup,
    listener: socket.socket | None = None,
) -> dict[int, int]:
    """The round on this node, from its first process to its last; the exit code of each rank.

    Rank 0 gets the `listener`. Ours is closed then: if it dies, its peers are to see that nobody listens.
    """
    job, running = station.job, list[RankProcess]()
    log = events_path(job.folder, one.start).stem
    station.output.open_logs(job.folder.logs, log, job.place.ranks)
    try:
        for rank in _who(job, one):
            running.append(_spawn(station, one, rank, listener))
            station.guard.add(running[-1].pid)
        if listener is not None:
            listener.close()
        return Watchdog(running, team, station).until_the_end()
    finally:
        for process in running:
            if process.process.returncode is None:
                process.reap()
            process.close()
        end_strays(spare={station.guard.pid})


def _who(job: SupervisorJob, one: Round) -> range:
    """The ranks to start; staging runs in the name of the first one."""
    ranks = job.place.ranks
    if one.what == "ranks":
        return ranks
    return ranks[:1] if job.stage is not None else ranks[:0]


def _spawn(
    station: SupervisorContext, one: Round, rank: int, listener: socket.socket | None
) -> RankProcess:
    job = station.job
    terminal = station.terminal if rank == 0 else None
    if one.what == "stage":
        assert job.stage is not None
        env = {**job.env, "LMSCALE_START": one.start}
        return spawn(job.stage, env, rank=rank, terminal=terminal, shares=False)
    env = job.place.environment(job.env, rank=rank, port=one.port, start=one.start)
    inherits = listener if rank == 0 and job.place.ranked else None
    return spawn(
        job.command, env, rank=rank, terminal=terminal, shares=job.place.ranked, listener=inherits
    )


def end_strays(*, spare: set[int], within_s: float = 5.0) -> None:
    """Kill and reap every other child of this process: what ranks started outside of their groups.

    One that waits for a hung file server does not die before that answers: nobody waits for it.
    """
    until = time.monotonic() + within_s
    while time.monotonic() < until:  # killing one hands its own children over to us
        pids = children() - spare
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)
