"""The state of a run and its reason, for people: a pure function of its folder and its cluster's answer.

Where they disagree the cluster is believed about what is queued and what runs, and a start about how
it ended; what neither wrote is in the decision of the batch script (RUN/jobs/K.end). What is merely
not known never counts as failed.
"""

import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lmscale.base.errors import FINAL, ExitCode
from lmscale.base.units import show_seconds
from lmscale.run_folder.liveness import STALE_S
from lmscale_launcher.clusters.base import JobState
from lmscale_launcher.clusters.kinds import cluster_of
from lmscale_launcher.jobs.run_facts import (
    Event,
    JobEnd,
    RunFacts,
    StartRecord,
    belongs,
    newest_start_of,
    when,
)

_WORDS = {
    ExitCode.DONE: "done",
    ExitCode.BUG: "internal error",
    ExitCode.USAGE: "wrong command line",
    ExitCode.DATA: "damaged data",
    ExitCode.RETRY: "a peer or the storage was lost",
    ExitCode.CONFIG: "configuration",
    ExitCode.SAVED: "saved and stopped on request",
    ExitCode.DIVERGED: "diverged",
    ExitCode.OVERTAKEN: "overtaken by a newer start",
}


def is_final(code: int | None) -> bool:
    """Whether nothing starts the run again after this exit code."""
    return code == ExitCode.DONE or code in FINAL


def code_in_words(code: int) -> str:
    """An exit code as text, with the code: damaged data, 65."""
    if code > 128:
        with suppress(ValueError):
            return f"died by {signal.Signals(code - 128).name}, {code}"
    with suppress(ValueError):
        return f"{_WORDS[ExitCode(code)]}, {code}"
    return f"exit code {code}"


def end_in_words(start: StartRecord) -> str:
    """How a start ended: its exit code and, where it says more, what it wrote."""
    event = start.exit or start.restart or {}
    code = event.get("code")
    if not isinstance(code, int):
        return "ended"
    rank_exit = start.rank_exit if (start.rank_exit or {}).get("code") == code else None
    cause = (
        start.cause if code == ExitCode.RETRY or code > 128 else ""
    )  # else the rank knows better
    told = cause or _telling(rank_exit, code) or start.first_dead or _telling(event, code)
    return f"{code_in_words(code)}: {told}" if told else code_in_words(code)


def without_code(text: str, code: int | None) -> str:
    """A supervisor's words without the exit code they begin with, which is shown in other words."""
    head, _, rest = text.partition("; ")
    return rest if rest and code is not None and head.endswith(f", {code}") else text


def _telling(event: Any, code: int) -> str:
    """The first line of an event's reason, unless it only repeats the exit code."""
    lines = str((event or {}).get("reason") or "").strip().splitlines()
    text = lines[0].strip() if lines else ""
    plain = {str(code), code_in_words(code)}
    with suppress(ValueError):
        name = ExitCode(code).name.lower()
        text = text.removeprefix(f"{name}, {code}: ")
        plain |= {name, f"{name}, {code}"}
    return "" if text in plain else text


State = Literal[
    "pending",  # in the cluster's queue for the first time
    "starting",  # its processes are there, its first step is not
    "running",
    "saving",  # asked to save and stop
    "waiting",  # to start again
    "stopped",  # by a person, or at train.stop_at; resumes on request
    "finished",
    "failed",  # and nothing starts it again
    "lost",  # disappeared without an exit event
    "unknown",
]
Verdict = tuple[State, str]
_SLOW_S = 300.0  # no new step for so long is worth a word: longer than most evaluations and saves


def verdict(
    facts: RunFacts, start: StartRecord | None, answer: JobState | None, *, now: float
) -> Verdict:
    """The state and its reason."""
    if facts.trouble:
        return "unknown", facts.trouble
    record = facts.record
    if answer is None or record is None:
        return _by_folder(facts, start, now=now)
    own = start if start is not None and belongs(start, record) else None
    if own is None and start is not None and start.time >= record.time:  # by hand, after the job
        over = answer.standing in ("ended", "unknown")
        if over or _lives(facts, start, now=now):
            return _by_folder(facts, start, now=now)
    match answer.standing:
        case "pending":
            return _pending(facts, own, answer)
        case "running":
            return _at_work(facts, own, answer, now=now)
        case "ended":
            return _over(facts, own, answer, now=now)
        case _:
            return _without_answer(facts, own, answer, now=now)


def _by_folder(facts: RunFacts, start: StartRecord | None, *, now: float) -> Verdict:
    """Without a cluster to ask: a process that can be seen, else the heartbeat."""
    if start is None:
        return "unknown", "not started yet"
    if start.exit is not None:
        return _ended(facts, start)
    if _lives(facts, start, now=now):
        return _living(facts, start, now=now)
    if facts.finished is not None and start.from_step is not None:
        return "finished", ""
    if facts.stop is not None:
        return _by_stop(facts, start)
    if facts.alive is False:
        return "lost", f"its process on {start.host} disappeared without writing an exit event"
    return "lost", f"no heartbeat for {_silence(facts, start, now=now)} ({start.host})"


def _pending(facts: RunFacts, own: StartRecord | None, answer: JobState) -> Verdict:
    why = answer.reason or answer.raw
    if own is None:
        return "pending", why
    if not why and own.exit is None and own.restart is None and facts.end is not None:
        return "waiting", f"{code_in_words(facts.end.code)}: {facts.end.reason}"
    if why or (own.exit is None and own.restart is None):
        return "waiting", why
    return "waiting", end_in_words(own)


def _by_script(end: JobEnd) -> Verdict:
    """The decision that the batch script wrote, where nothing follows."""
    if end.code in (ExitCode.DONE, ExitCode.SAVED):
        return "stopped", end.reason
    return "failed", f"{code_in_words(end.code)}: {end.reason}"


def _at_work(facts: RunFacts, own: StartRecord | None, answer: JobState, *, now: float) -> Verdict:
    """The cluster says that the job runs."""
    if own is None:
        where = f"on {', '.join(answer.hosts)}, " if answer.hosts else ""
        return "starting", where + (answer.reason or "no word from it yet")
    if own.exit is None:
        state, why = _living(facts, own, now=now)
        return state, "; ".join(filter(None, [why, answer.reason]))  # e.g. suspended
    if facts.stop is not None or is_final(own.code):
        return _ended(facts, own)
    return "waiting", end_in_words(own)


def _over(facts: RunFacts, own: StartRecord | None, answer: JobState, *, now: float) -> Verdict:
    """The cluster says that the job has ended."""
    final = own is not None and own.exit is not None and is_final(own.code)
    if answer.raw.upper().startswith("CANCELLED") and facts.stop is None and not final:
        return "stopped", _cancelled(own, answer) + _orphan(facts, own, now=now)
    if own is not None and own.exit is not None:
        return _ended(facts, own)
    if facts.finished is not None and not answer.code:
        return "finished", ""
    if facts.stop is not None:
        return _by_stop(facts, own)
    if facts.end is not None and not facts.end.again:
        state, why = _by_script(facts.end)
        return state, why + _orphan(facts, own, now=now)
    words = answer.reason or answer.raw
    if answer.code:
        told = code_in_words(answer.code)
        words = f"{words}, {told}" if words else f"{told}; its log may say why"
    state = "failed"
    if words == "killed":
        state, words = "lost", "killed: its process disappeared without writing an exit event"
    elif not answer.code and (answer.code is not None or not words):
        state, words = "lost", "the job ended without writing an exit event"
    return state, words + _orphan(facts, own, now=now)


def _cancelled(own: StartRecord | None, answer: JobState) -> str:
    """Cancelled with the cluster's own tools; the answer is `cancelled` or `cancelled by user 1000`."""
    who = answer.reason.partition("cancelled by ")[2].partition(";")[0]
    by = f" by {who}" if who else ""
    how = f"; it ended with {end_in_words(own)}" if own is not None and own.exit is not None else ""
    return f"cancelled with scancel{by}; `lmscale resume` continues from its newest checkpoint{how}"


def _orphan(facts: RunFacts, own: StartRecord | None, *, now: float) -> str:
    """A word about a start that outlives its job, or is not yet known to be dead."""
    if own is None or not _lives(facts, own, now=now):
        return ""
    return f"; {own.host} was heard of {_silence(facts, own, now=now)} ago"


def _without_answer(
    facts: RunFacts, own: StartRecord | None, answer: JobState, *, now: float
) -> Verdict:
    """The cluster does not answer, or no longer knows the job: the state by the folder alone."""
    silent = answer.reason or "the cluster did not answer"
    if own is None and facts.stop is not None and answer.raw == "FORGOTTEN":
        return _by_stop(facts, None)  # a job that is out of the queue for minutes
    decided = facts.end is not None and not facts.end.again
    # A start that began after the decision is a newer one: its script could not remove the old file.
    newer = own is not None and facts.end is not None and own.time > facts.end.time
    if facts.end is not None and decided and not newer and (own is None or own.exit is None):
        return _by_script(facts.end)
    if own is None:
        return "unknown", silent
    state, why = _by_folder(facts, own, now=now)
    restartable = own.exit is not None and facts.stop is None and not is_final(own.code)
    if state == "lost" or (restartable and not decided):
        state = "unknown"  # it may be in the queue, to start again
    return state, f"{why}; {silent}" if why else silent


def _living(facts: RunFacts, start: StartRecord, *, now: float) -> Verdict:
    """A start that is alive, as far as is known."""
    age_s = now - (facts.beat_time or start.time)
    if facts.alive is False:
        return "running", f"but its process on {start.host} has disappeared"
    if age_s >= STALE_S:
        return "running", f"but no heartbeat for {_silence(facts, start, now=now)} ({start.host})"
    written = facts.status
    if written is not None and written.start == start.name:
        # While the heartbeat is fresh this is the supervisor's own state.
        if written.state == "saving" or (written.state == "waiting" and written.reason):
            return written.state, written.reason
        if written.state == "running" and written.reason:
            return "running", written.reason
    if start.restart is not None:
        return "waiting", end_in_words(start)
    if facts.stop is not None:
        return "saving", "asked to stop by lmscale stop"
    if start.stuck is not None and when(start.stuck) >= (facts.lines_time or 0.0):
        return "running", start.cause or "stuck"
    return _stepping(facts, start, now=now)


def _stepping(facts: RunFacts, start: StartRecord, *, now: float) -> Verdict:
    newest = facts.lines[-1].get("step") if facts.lines else None
    if start.from_step is None:
        return "starting", f"for {show_seconds(max(now - start.time, 0))}"
    if not isinstance(newest, int) or newest <= start.from_step:
        return "starting", f"at step {start.from_step}, before its first step"
    idle_s = now - (facts.lines_time or now)
    if idle_s >= _SLOW_S:
        return "running", f"but no new step for {show_seconds(idle_s)}"
    return "running", ""


def _ended(facts: RunFacts, start: StartRecord) -> Verdict:
    """By the exit code that the start itself has written."""
    words = end_in_words(start)
    match start.code:
        case ExitCode.DONE if facts.finished is not None:
            return "finished", ""
        case ExitCode.DONE:
            newest = facts.lines[-1].get("step") if facts.lines else None
            return "stopped", "at train.stop_at" + (f", step {newest}" if newest else "")
        case ExitCode.SAVED if facts.stop == "":
            return "stopped", "by lmscale stop"
        case ExitCode.SAVED | ExitCode.OVERTAKEN:
            return "stopped", words
    if facts.stop:  # the launcher's own words: its budget of restarts is spent
        return "failed", f"{words}; {without_code(facts.stop, start.code)}"
    if facts.stop is not None:
        return "stopped", f"by lmscale stop; {words}"
    return "failed", words


def _by_stop(facts: RunFacts, start: StartRecord | None) -> Verdict:
    """RUN/stop of something that has not said how it ended. Words in it are the launcher's: it gave up."""
    if facts.stop:
        return "failed", facts.stop
    return "stopped", f"by lmscale stop, {'without saving' if start else 'before it started'}"


def _lives(facts: RunFacts, start: StartRecord, *, now: float) -> bool:
    """Whether a start is alive, by its processes where they can be seen and its heartbeat."""
    if start.exit is not None or facts.alive is False:
        return False
    return now - (facts.beat_time or start.time) < STALE_S


def _silence(facts: RunFacts, start: StartRecord, *, now: float) -> str:
    """How long ago its last heartbeat was."""
    return show_seconds(max(now - (facts.beat_time or start.time), 0))


ACTIVE: frozenset[State] = frozenset({"pending", "starting", "running", "saving", "waiting"})
ENDED: frozenset[State] = frozenset({"stopped", "finished", "failed", "lost"})
_AT_WORK: frozenset[State] = frozenset({"running", "saving"})
_SAVES = 10  # behind the time left


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run, as `lmscale status` shows it. None: not known, or not applicable."""

    run: str  # as a user may name it
    path: Path
    state: State
    reason: str  # in words; may be empty
    kind: str | None  # of its cluster; None: started by hand
    job: str | None  # the cluster's name for it
    nodes: int | None  # it runs on, else that it asks for
    min_nodes: int | None
    hosts: tuple[str, ...]
    step: int | None  # the newest that is recorded
    total_steps: int | None
    loss: float | None
    tokens_per_s: float | None  # of the current start
    eta_s: float | None
    restarts: int  # starts that no person made, besides the first
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    attempt: int | None
    start: str | None  # name of the newest start
    code: int | None  # exit code of the newest start, or of the job, once it has ended
    heard_s: float | None  # since the newest heartbeat

    @property
    def active(self) -> bool:
        """Whether it is queued or at work."""
        return self.state in ACTIVE

    @property
    def ended(self) -> bool:
        """Whether nothing continues by itself. An unknown standing is neither active nor ended."""
        return self.state in ENDED

    def in_words(self) -> str:
        """State and reason as one sentence."""
        state = "waiting to start again" if self.state == "waiting" else self.state
        if self.state == "running" and self.reason.startswith("but "):
            return f"running, {self.reason}"
        return f"{state}: {self.reason}" if self.reason else state


def judge(facts: RunFacts, answer: JobState | None, *, now: float, name: str = "") -> RunStatus:
    """The standing of a run. `answer`: what its cluster says of the newest job, None without a job."""
    start = newest_start_of(facts.events)
    state, reason = verdict(facts, start, answer, now=now)
    lines = _of_this_start(facts.lines, start)
    seconds = (_pace(facts.events) or _seconds_a_step(lines)) if state in _AT_WORK else None
    step = _step(facts, start)
    total = facts.planned_steps
    record, saved = facts.record, facts.saved
    left = max(total - step, 0) if total is not None and step is not None else None
    return RunStatus(
        run=name or facts.folder.path.name,
        path=facts.folder.path,
        state=state,
        reason=reason,
        kind=record.kind if record else None,
        job=record.job if record else None,
        nodes=_nodes(facts, start, answer),
        min_nodes=record.min_nodes if record else None,
        hosts=_hosts(start, answer, running=state in _AT_WORK or state == "starting"),
        step=step,
        total_steps=total,
        loss=_number(facts.lines[-1].get("loss")) if facts.lines else None,
        tokens_per_s=_rate(lines) if state in _AT_WORK else None,
        eta_s=left * seconds if left is not None and seconds is not None else None,
        restarts=_restarts(facts.starts),
        checkpoint_step=saved.step if saved else None,
        checkpoint_age_s=max(now - saved.time, 0.0) if saved else None,
        attempt=facts.attempt or None,
        start=start.name if start else None,
        code=_code(facts, start, answer),
        heard_s=max(now - facts.beat_time, 0.0) if facts.beat_time is not None else None,
    )


def _step(facts: RunFacts, start: StartRecord | None) -> int | None:
    """Steps done: by the metrics, or where the newest start resumes from before its first line."""
    recorded = facts.lines[-1].get("step") if facts.lines else None
    if isinstance(recorded, int):
        return recorded
    return start.from_step if start is not None else (0 if facts.record is not None else None)


def _of_this_start(lines: Sequence[Event], start: StartRecord | None) -> list[Event]:
    """The newest lines that the current start has written."""
    if start is None or start.from_step is None:
        return []
    return [line for line in lines if _number(line.get("step")) and line["step"] > start.from_step]


def _rate(lines: Sequence[Event]) -> float | None:
    """Tokens a second over the newest lines. The median: a line may hold a slow first step."""
    rates = [rate for line in lines if (rate := _number(line.get("tokens_per_s")))]
    return median(rates) if rates else None


def _pace(events: Sequence[Event]) -> float | None:
    """Seconds a step between the last checkpoints: with evaluations and saves, which take time too."""
    saves = [event for event in events if event.get("kind") == "save"][-_SAVES:]
    done = [step for event in saves if (step := _number(event.get("step"))) is not None]
    if len(done) < 2 or len(done) < len(saves):
        return None
    steps, seconds = done[-1] - done[0], when(saves[-1]) - when(saves[0])
    return seconds / steps if steps > 0 and seconds > 0 else None


def _seconds_a_step(lines: Sequence[Event]) -> float | None:
    """By the newest lines, until there are two checkpoints. Evaluations and saves are not in them."""
    found = []
    for before, line in pairwise(lines):
        tokens = (_number(line.get("tokens")) or 0) - (_number(before.get("tokens")) or 0)
        rate = _number(line.get("tokens_per_s"))
        if rate and tokens > 0:
            found.append(tokens / rate)
    return median(found) if found else None


def _restarts(starts: Sequence[Event]) -> int:
    """Starts that no person made. The first is not one."""
    return sum(not (start.get("by_hand") or start.get("fresh")) for start in starts[1:])


def _nodes(facts: RunFacts, start: StartRecord | None, answer: JobState | None) -> int | None:
    record = facts.record
    if answer is not None and answer.standing == "running" and answer.hosts:
        complete = record is None or cluster_of(record.kind).reports_all_hosts
        return max(len(answer.hosts), record.nodes if record and not complete else 0)
    if start is not None and (record is None or not belongs(start, record)):
        return len(start.nodes) or 1
    if record is None:
        return None
    active = start is not None and start.exit is None and start.restart is None
    if start is not None and active and cluster_of(record.kind).reports_all_hosts:
        return len(start.nodes) or record.nodes  # of an elastic job, while its cluster is silent
    return record.nodes


def _hosts(start: StartRecord | None, answer: JobState | None, *, running: bool) -> tuple[str, ...]:
    if answer is not None and answer.hosts:
        return answer.hosts
    if not running or start is None:
        return ()
    return start.nodes or ((start.host,) if start.host else ())


def _code(facts: RunFacts, start: StartRecord | None, answer: JobState | None) -> int | None:
    """How it ended: the newest start's own word, else the cluster's."""
    of_job = start is not None and (facts.record is None or belongs(start, facts.record))
    if start is not None and start.code is not None and (of_job or answer is None):
        return start.code
    if (
        facts.end is not None
        and not facts.end.again
        and (start is None or (of_job and start.time <= facts.end.time))
        and (answer is None or answer.standing in ("ended", "unknown"))
    ):
        return facts.end.code
    return answer.code if answer is not None and answer.standing == "ended" else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
