"""The supervisor behind `lmscale train`: it starts the ranks of all nodes, and restarts them after failures.

It has one thread, so that forking is safe and the death signal of the ranks is tied to the process. No process
that it starts outlives it, however it ends.
"""

import itertools
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from lmscale.base.errors import ExitCode, LmscaleError, RetryableError, decisive, is_restartable
from lmscale.base.fs import atomic_write, read_text, storage_errors
from lmscale.base.listener import listen
from lmscale.base.proc import adopt_orphans
from lmscale.run_folder.bad_nodes import BadNode, read_bad_nodes, write_bad_nodes
from lmscale.run_folder.events import read_events, starts_since_progress
from lmscale.run_folder.liveness import begin_start
from lmscale.run_folder.status_file import state_after_exit
from lmscale_launcher.supervisor.context import SupervisorContext, SupervisorJob
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.guard import Guard
from lmscale_launcher.supervisor.member import run_member
from lmscale_launcher.supervisor.messages import RoundKind
from lmscale_launcher.supervisor.node_round import run_round
from lmscale_launcher.supervisor.output import Output, describe_exit
from lmscale_launcher.supervisor.protocol import Round, code_after_lost_node
from lmscale_launcher.supervisor.rendezvous import Rendezvous, StartupFailure, rendezvous
from lmscale_launcher.supervisor.signals import Signals

_MAX_RESTART_DELAY_S = 60.0
_ERROR_RENDEZVOUS_S = 60.0  # for other nodes to learn that this one cannot start


def supervise(job: SupervisorJob, *, terminal: int = 2) -> int:
    """Run the job to its end and return the exit code that is decisive over all ranks of all nodes.

    Call it from the main thread of a process without other threads. Raises ConfigError when another process
    is training in the folder.
    """
    with _open_context(job, terminal) as context:
        return run_member(context) if job.topology.node else _run_coordinator(context)


def report_startup_error(job: SupervisorJob, error: LmscaleError, *, terminal: int = 2) -> int:
    """Report to the other nodes that this one cannot start, so that they do not wait for it.

    An error on node 0 is an error of the run and ends all nodes; on another node it is an error of that node
    alone. Raises `error` again where node 0 is not found.
    """
    failing = replace(job, unhealthy=(str(error),), rendezvous_timeout_s=_ERROR_RENDEZVOUS_S)
    with _open_context(failing, terminal) as context:
        if job.topology.node:
            with suppress(RetryableError):
                return run_member(context)
            raise error
        with suppress(RetryableError):
            rendezvous(context).coordinator.leave(error.exit_code, str(error))
    raise error


@contextmanager
def _open_context(job: SupervisorJob, terminal: int) -> Iterator[SupervisorContext]:
    several = job.topology.nodes > 1
    in_place = os.isatty(terminal) and not several
    output = Output(terminal, in_place=in_place, host=job.host if several else "")
    # Orphans of the ranks become children of this process instead of init's, and can be killed.
    adopt_orphans()
    with Signals() as signals, Guard() as guard, EventLoop() as loop:
        loop.watch(signals.descriptor, signals.drain)
        try:
            yield SupervisorContext(
                job, loop, output, signals, guard, terminal if in_place else None
            )
        finally:
            output.close()


def _run_coordinator(context: SupervisorContext) -> int:
    """Node 0: the rendezvous and the starts, unless there is nothing to do; the exit code of all nodes."""
    message = _reason_not_to_start(context.job)
    if message and context.job.topology.nodes == 1:
        context.output.report(message)
        return ExitCode.DONE
    nodes = rendezvous(context)
    try:
        if message:
            context.output.report(message)
            nodes.coordinator.leave(ExitCode.DONE, "")
            return ExitCode.DONE
        with storage_errors(f"supervising {context.job.folder.path}"):
            return _StartLoop(context, nodes).run()
    except LmscaleError as error:
        nodes.coordinator.leave(error.exit_code, "")
        raise


def _reason_not_to_start(job: SupervisorJob) -> str:
    """Why this start does nothing and exits with 0; any other code would make a scheduler try again."""
    if job.by_hand or not job.folder.stop.exists():
        return job.finished_message
    with storage_errors(f"reading {job.folder.stop}"):
        reason = read_text(job.folder.stop).strip()
    return (
        f"stopped by {reason or '`lmscale stop`'}: run `lmscale resume`, or remove {job.folder.stop}, to "
        "continue"
    )


class _StartLoop:
    """Node 0's policy: one start after the other, until the run ends or the restart budget is used up."""

    def __init__(self, context: SupervisorContext, nodes: Rendezvous) -> None:
        self._context = context
        self._job = context.job
        self._nodes = nodes
        self._coordinator = nodes.coordinator
        self._output = context.output
        self._staged = context.job.stage is None

    def run(self) -> int:
        """Start the ranks, and restart them as often as it makes sense."""
        job = self._job
        bad_nodes = read_bad_nodes(job.folder)
        for count in itertools.count():
            start = f"{job.start}.{count}" if count else job.start
            events = begin_start(
                job.folder,
                start,
                by_hand=job.by_hand and count == 0,
                fresh=job.fresh and count == 0,
                ranks=job.topology.num_ranks * job.topology.nodes,
                nodes=self._coordinator.hosts,
            )
            self._coordinator.record(events)
            try:
                failure = self._startup_failure() if count == 0 else None
                if failure is not None:
                    reason = f"{describe_exit(failure.code)}: {failure.reason}"
                    return self._leave(failure.code, reason)
                code = self._run_start(start)
                if not self._coordinator.stop_requested and self._may_restart(code, bad_nodes):
                    self._write_event("restart", code, describe_exit(code))
                    self._coordinator.report_status(
                        "waiting", reason=f"{describe_exit(code)}; restarting"
                    )
                    if self._wait_before_restart():
                        continue
                    code = code_after_lost_node(code) if self._coordinator.lost else code
                return self._leave(code, describe_exit(code))
            finally:
                self._coordinator.record(None)
                events.close()
        raise AssertionError("unreachable: the loop above only returns")

    def _startup_failure(self) -> StartupFailure | None:
        """Why not even one start can be made, after its events are written; None where it can."""
        nodes = self._nodes
        for number in nodes.missing:
            self._coordinator.write_event(
                "lost_node", node="", number=number, reason="it did not connect"
            )
        for host, reasons in nodes.unhealthy.items():
            self._coordinator.write_event("bad_node", node=host, reasons=reasons)
        write_bad_nodes(
            self._job.folder,
            {host: "\n".join(reasons) for host, reasons in nodes.unhealthy.items()},
        )
        failure = nodes.failure or self._budget_failure()
        if failure is not None:
            self._output.report(failure.reason)
        return failure

    def _budget_failure(self) -> StartupFailure | None:
        """Whether earlier starts have used up the restart budget and died with their nodes."""
        job = self._job
        starts = starts_since_progress(read_events(job.folder))
        # One restart by a scheduler is always allowed: max_restarts=0 is about restarts by this supervisor.
        if job.by_hand or starts <= max(job.max_restarts, 1):
            return None
        reason = (
            f"not started: {starts - 1} restarts since the newest checkpoint, the last one without an exit "
            f"event; cluster.max_restarts={job.max_restarts}"
        )
        return StartupFailure(ExitCode.RETRY, self._give_up(reason))

    def _run_start(self, start: str) -> int:
        """Stage the data, unless that is done, and run all ranks once."""
        coordinator = self._coordinator
        if not self._staged:
            coordinator.report_status("starting", reason="filling data.cache_dir of the nodes")
            code = self._run_round("stage", start)
            if code != ExitCode.DONE and not (coordinator.stop_requested and code > 128):
                return code
            self._staged = True
        # A rank that gets a signal before Python has installed its handlers would die unsaved.
        if not self._may_start():
            return ExitCode.RETRY if coordinator.lost else ExitCode.SAVED
        with _listen_for_ranks() as listener:
            return self._run_round("ranks", start, listener)

    def _run_round(self, kind: RoundKind, start: str, listener: socket.socket | None = None) -> int:
        port = listener.getsockname()[1] if listener is not None else 0
        this_round = Round(kind, start, port)
        self._coordinator.go(this_round)
        codes = run_round(self._context, this_round, self._coordinator, listener)
        self._coordinator.codes |= codes
        code = decisive(self._coordinator.codes.values())
        return code_after_lost_node(code) if self._coordinator.lost else code

    def _may_restart(self, code: int, bad_nodes: Collection[BadNode]) -> bool:
        """Whether to restart in place; reports the reason where a user may expect a restart."""
        job = self._job
        if not is_restartable(code) or job.folder.stop.exists():
            return False
        if self._coordinator.lost:
            self._output.report(
                f"{self._coordinator.lost}. All nodes exit with 75 (retry), to be started again"
            )
            return False
        new_hosts = sorted(
            {node.host for node in read_bad_nodes(job.folder) if node not in bad_nodes}
        )
        if new_hosts and job.topology.nodes > 1 and not job.by_hand:
            self._output.report(
                f"{', '.join(new_hosts)}: marked bad in {job.folder.bad_nodes}. All nodes exit, to be started "
                "without it"
            )
            return False
        restarts = starts_since_progress(read_events(job.folder))
        if restarts >= job.max_restarts:
            reason = (
                f"{describe_exit(code)}; not started again: {restarts} restarts since the newest checkpoint, "
                f"cluster.max_restarts={job.max_restarts}"
            )
            self._output.report(self._give_up(reason))
            return False
        self._output.report(
            f"{describe_exit(code)}; starting again, restart {restarts + 1} of at most {job.max_restarts} "
            "without a newer checkpoint"
        )
        return True

    def _give_up(self, reason: str) -> str:
        """Write RUN/stop where a scheduler could start the run again; the message for the user."""
        job = self._job
        if job.by_hand:
            return f"{reason}. Run the same command again to resume"
        with storage_errors(f"writing {job.folder.stop}"):
            atomic_write(job.folder.stop, f"{reason}\n".encode())
        return f"{reason}. Run `lmscale resume {job.folder.path}` to resume"

    def _wait_before_restart(self) -> bool:
        """Wait before a restart; False when a stop was requested or a node was lost meanwhile."""
        job = self._job
        restarts = starts_since_progress(read_events(job.folder))
        delay_s = min(job.restart_delay_s * 2 ** min(restarts, 16), _MAX_RESTART_DELAY_S)
        deadline = time.monotonic() + delay_s
        while self._may_start():
            if time.monotonic() >= deadline:
                return True
            self._context.loop.turn(min(0.1, job.restart_delay_s))
        return False

    def _may_start(self) -> bool:
        """Handle requests and lost nodes while no rank runs; False when there are any."""
        coordinator = self._coordinator
        for number in self._context.signals.take():
            coordinator.stop(number)
        coordinator.take()
        coordinator.tick(None)
        return not (coordinator.stop_requested or coordinator.lost)

    def _leave(self, code: int, reason: str) -> int:
        """Let all nodes exit with this code; node 0 writes the last event after they have."""
        failure = self._nodes.failure
        self._coordinator.leave(code, failure.reason if failure is not None else "")
        self._write_event("exit", code, reason)
        self._report_end(code, reason)
        return code

    def _report_end(self, code: int, reason: str) -> None:
        """Write the last status. The exit code is decided: a file system that fails now must not change it."""
        job = self._job
        with suppress(OSError, LmscaleError):
            state, phrase = state_after_exit(job.folder, code, scheduled=not job.by_hand)
            if state == "waiting":
                phrase = f"{reason}; {phrase}"
            self._coordinator.report_status(state, reason=reason if state == "failed" else phrase)

    def _write_event(self, kind: str, code: int, reason: str) -> None:
        codes = self._coordinator.codes
        self._coordinator.write_event(kind, code=int(code), reason=reason, codes=codes)


def _listen_for_ranks() -> socket.socket:
    try:
        return listen()
    except OSError as error:
        raise RetryableError(
            f"cannot open a listening port for the ranks: {error}; see `ss -ltn` and `ulimit -n`"
        ) from error
