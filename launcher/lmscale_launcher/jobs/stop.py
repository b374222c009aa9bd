"""`lmscale stop RUN`: ask a run to save and stop, and keep everything from starting it again."""

import signal
import time
from dataclasses import dataclass
from typing import Any

from lmscale.base.errors import ExitCode, RetryableError
from lmscale.base.fs import storage_errors
from lmscale.base.proc import is_alive, started_ticks
from lmscale.run_folder.events import Event, read_events
from lmscale.run_folder.liveness import LiveRun, live
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.background import signal_to
from lmscale_launcher.clusters.base import Cluster, JobState
from lmscale_launcher.clusters.job import JobRecord
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.jobs.interrupts import exits_on_interrupt
from lmscale_launcher.jobs.job_plan import newest_record
from lmscale_launcher.jobs.run_facts import find_run_folder
from lmscale_launcher.jobs.run_state import code_in_words
from lmscale_launcher.jobs.submit import Say, in_words, run_name

_POLL_S = 0.1
_REMIND_S = 10.0
_QUERY_SOON_S = 2.0  # once the process has ended: its job is about to follow
_KILL_S = 60.0  # for a cluster to end what it was asked to cancel


def stop(run: str, *, now: bool, as_json: bool) -> int:
    """Write RUN/stop and wait until the run has saved and ended; with `now` end it without saving."""
    folder, say = find_run_folder(run), Say(as_json)
    with storage_errors(f"writing {folder.stop}"):
        folder.stop.touch()
    ending = _Ending(folder, newest_record(folder), say, since=time.time())
    with exits_on_interrupt(lambda: say.lines(f"the request remains: {folder.stop}")):
        result = ending.kill() if now else ending.save()
    say.lines(_in_words(result))
    say.result({"run": str(folder.path), **result})
    return ExitCode.DONE if result["ended"] or not now else ExitCode.RETRY


@dataclass
class _Ending:
    """A run on its way to its end."""

    folder: RunFolder
    record: JobRecord | None
    say: Say
    since: float

    def save(self) -> dict[str, Any]:
        """Let it save and end by itself."""
        state, found = self._state(), live(self.folder)
        if self.record is not None and state.standing == "pending" and self._withdraw():
            state = self._state()
            if state.standing in ("pending", "ended", "unknown") and found is None:
                return self._result("withdrawn", ended=True)
        if found is not None and found.here:
            signal_to(found.pid, signal.SIGTERM)
        if found is None and state.standing not in ("running", "pending"):
            return self._nothing_runs(state)
        if self._gone(found, state):
            return self._result("not running", ended=True)
        where = found.host if found is not None else ", ".join(state.hosts) or "the cluster"
        self.say.lines(f"asked the run on {where} to save and stop; waiting until it has")
        self._wait(found, state, forever=True)
        return self._result("stopped", ended=True)

    def kill(self) -> dict[str, Any]:
        """End it without saving."""
        state, found = self._state(), live(self.folder)
        if self.record is not None and state.standing != "ended":
            try:
                self._cluster().cancel(self.folder, self.record)
            except RetryableError:
                self.say.lines(f"the request to save and stop remains: {self.folder.stop}")
                raise
            # What it killed elsewhere leaves a heartbeat that looks young for a minute: believe the cluster.
            found = found if found is not None and found.here else None
        elif found is None or self._gone(found, state):
            return self._nothing_runs(state)
        elif not found.here:
            self.say.lines(f"it runs on {found.host}: only `lmscale stop --now` there can kill it")
            self._wait(found, state, forever=True)
            return self._result("stopped", ended=True)
        if found is not None:
            signal_to(found.pid, signal.SIGKILL)
        return self._result("killed", ended=self._wait(found, state, forever=False))

    def _gone(self, found: LiveRun | None, state: JobState) -> bool:
        """Whether the scheduler confirms the end of the newest job, however young its heartbeat looks."""
        if self.record is None or not self._cluster().confirms_job_end:
            return False
        of_job = found is None or (
            not found.here and found.start.startswith(f"{self.record.kind}-")
        )
        return of_job and state.standing == "ended"

    def _cluster(self) -> Cluster:
        assert self.record is not None
        return cluster_of(self.record.kind)

    def _state(self) -> JobState:
        """The cluster's answer about the newest job; ended where there is none."""
        if self.record is None:
            return JobState("ended")
        (state,) = self._cluster().states([(self.folder, self.record)])
        return state

    def _withdraw(self) -> bool:
        assert self.record is not None
        try:
            taken = self._cluster().withdraw(self.folder, self.record)
        except RetryableError as error:
            self.say.lines(f"it cannot be taken out of the queue now: {error}")
            return False
        if taken:
            self.say.lines(f"{in_words(self.record)} was waiting and is out of the queue")
        return taken

    def _wait(self, found: LiveRun | None, state: JobState, *, forever: bool) -> bool:
        """Until process and job have ended; whether they have."""
        ticks = started_ticks(found.pid) if found is not None and found.here else None
        every_s = self._cluster().stop_poll_interval_s if self.record is not None else _POLL_S
        begun = told = time.monotonic()
        asked = 0.0
        while (
            runs := self._runs(found, ticks) and not self._gone(found, state)
        ) or state.standing in ("running", "pending"):
            time.sleep(_POLL_S)
            now = time.monotonic()
            over = found is not None and not runs  # its job is about to follow
            if now - asked >= (min(every_s, _QUERY_SOON_S) if over else every_s):
                answer, asked = self._state(), now
                # A silent controller ends no job; then only the run's own heartbeat can tell.
                if answer.standing != "unknown" or found is not None:
                    state = answer
            if not forever and now - begun > _KILL_S:
                return False
            if now - told > _REMIND_S:
                told = now
                self.say.lines(self._still(state))
        return True

    def _runs(self, found: LiveRun | None, ticks: int | None) -> bool:
        if found is None:
            return False
        if found.here:
            return ticks is not None and is_alive(found.pid, ticks)
        current = live(self.folder)
        return current is not None and current.host == found.host

    def _still(self, state: JobState) -> str:
        saved = self._saved()
        step = f", newest checkpoint: step {saved}" if saved is not None else ""
        word = f" ({state.reason})" if state.standing == "unknown" and state.reason else ""
        return (
            f"still waiting{word}{step}; Ctrl-C stops waiting, not the request; "
            f"to end it without saving: lmscale stop {run_name(self.folder)} --now"
        )

    def _nothing_runs(self, state: JobState) -> dict[str, Any]:
        if state.standing == "unknown":
            return self._result("unknown", ended=False, reason=state.reason)
        return self._result("not running", ended=True)

    def _saved(self) -> int | None:
        saves = [event for event in self._events() if event["kind"] == "save"]
        steps = [event["step"] for event in saves if "step" in event]
        return steps[-1] if steps else None

    def _events(self) -> list[Event]:
        """Those of the starts that did something since the request, else of the newest."""
        events = read_events(self.folder)
        recent = {event["start"] for event in events if event["time"] >= self.since}
        recent = recent or {event["start"] for event in events[-1:]}
        return [event for event in events if event["start"] in recent]

    def _result(self, what: str, *, ended: bool, reason: str = "") -> dict[str, Any]:
        exits = [event for event in self._events() if event["kind"] == "exit"]
        own = exits[-1] if exits and what == "stopped" else None
        return {
            "what": what,
            "ended": ended,
            "reason": reason,
            "code": own.get("code") if own else None,
            "checkpoint": self._saved(),
        }


def _in_words(result: dict[str, Any]) -> str:
    saved = result["checkpoint"]
    stands = (
        f"newest checkpoint of this start: step {saved}"
        if saved is not None
        else "no checkpoint was saved"
    )
    again = "nothing starts it again but `lmscale resume`, or `lmscale train` by hand"
    match result["what"]:
        case "not running":
            return f"it is not running; {again}"
        case "withdrawn":
            return f"it has not been running; {again}"
        case "unknown":
            return (
                f"whether it runs is not known: {result['reason']}. The request remains: it saves and "
                "stops within seconds if it runs, and does not start if it waits"
            )
        case "killed":
            still = "" if result["ended"] else "; its cluster has not ended it yet"
            return f"killed{still}; {stands}"
        case _:
            ended = f"it ended ({code_in_words(result['code'])})" if result["code"] is not None else (
                "it ended without writing an exit event"
            )  # fmt: skip
            return f"{ended}; {stands}"
