"""What runs on this node in one round: its ranks, or what stages its data. Nothing of it outlives the round.

The one selector of a supervisor: output of ranks, connections and signals all wake the same loop.
"""

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from lmscale.run_folder.events import events_path
from lmscale_launcher.supervisor.protocol import Round, SupervisorGroup
from lmscale_launcher.supervisor.rank_process import RankProcess, spawn
from lmscale_launcher.supervisor.supervisor import SupervisorContext, SupervisorJob
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
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    until = time.monotonic() + within_s
    while time.monotonic() < until:  # killing one hands its own children over to us
        try:
            pids = {int(pid) for pid in children.read_text().split()} - spare
        except OSError:  # a kernel without this file
            return
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)


# A turn counts at most this much: longer means that this process itself was stopped or blocked.
_MOST_S = 1.0


class EventLoop:
    """Waits for whatever comes first, and hands it to who asked for it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._at = time.monotonic()
        self.awake_s = (
            0.0  # how long this process has been looking: by this clock others are silent
        )

    def watch(self, descriptor: int, on_read: Callable[[], None]) -> None:
        """Call when there is something to read."""
        self._selector.register(descriptor, selectors.EVENT_READ, (on_read, None))

    def watch_writes(self, descriptor: int, on_write: Callable[[], None] | None) -> None:
        """Also call when there is room to write; None: no longer."""
        key = self._selector.get_key(descriptor)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if on_write else 0)
        self._selector.modify(descriptor, events, (key.data[0], on_write))

    def forget(self, descriptor: int) -> None:
        """No longer watch it."""
        self._selector.unregister(descriptor)

    def turn(self, timeout_s: float) -> None:
        """Wait until something has come, or for this long."""
        for key, events in self._selector.select(timeout_s):
            on_read, on_write = key.data
            if events & selectors.EVENT_WRITE and on_write is not None:
                on_write()
            # Writing may have found the connection closed and forgotten it.
            if events & selectors.EVENT_READ and key.fd in self._selector.get_map():
                on_read()
        now = time.monotonic()
        self.awake_s += min(now - self._at, _MOST_S)
        self._at = now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
