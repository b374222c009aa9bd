"""State and reason of a run: events and heartbeat of its newest start against the cluster's answer.

Where they disagree the cluster is believed about what is queued and what runs, and a start about how it
ended. Nothing that is merely not known counts as failed.
"""

from typing import Literal

from launcher.jobs.cluster import JobState
from launcher.jobs.exits import code_in_words, end_in_words, is_final, without_code
from launcher.jobs.facts import Facts, when
from launcher.jobs.start import Start, belongs
from lmscale.errors import ExitCode
from lmscale.run.liveness import STALE_S
from lmscale.units import show_seconds

State = Literal[
    "pending",  # in the cluster's queue for the first time
    "starting",  # its processes are there, its first step is not
    "running",
    "saving",  # asked to save and stop
    "waiting",  # to start again
    "stopped",  # by a person, or at train.stop_at; goes on when asked to
    "finished",
    "failed",  # and nothing starts it again
    "lost",  # ended without a word
    "unknown",
]
Verdict = tuple[State, str]
_SLOW_S = 300.0  # no new step for so long is worth a word: longer than most evaluations and saves


def verdict(facts: Facts, start: Start | None, answer: JobState | None, *, now: float) -> Verdict:
    """The state and its reason in words."""
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
            return _pending(own, answer)
        case "running":
            return _at_work(facts, own, answer, now=now)
        case "ended":
            return _over(facts, own, answer, now=now)
        case _:
            return _without_answer(facts, own, answer, now=now)


def _by_folder(facts: Facts, start: Start | None, *, now: float) -> Verdict:
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
        return "lost", f"its process on {start.host} is gone without a word"
    return "lost", f"no heartbeat for {_silence(facts, start, now=now)} ({start.host})"


def _pending(own: Start | None, answer: JobState) -> Verdict:
    why = answer.reason or answer.raw
    if own is None:
        return "pending", why
    if why or (own.exit is None and own.restart is None):
        return "waiting", why
    return "waiting", end_in_words(own)


def _at_work(facts: Facts, own: Start | None, answer: JobState, *, now: float) -> Verdict:
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


def _over(facts: Facts, own: Start | None, answer: JobState, *, now: float) -> Verdict:
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
    words = answer.reason or answer.raw
    if answer.code:
        told = code_in_words(answer.code)
        words = f"{words}, {told}" if words else f"{told}; its log may say why"
    state: State = "failed"
    if words == "killed":
        state, words = "lost", "killed: its process is gone without a word"
    elif not answer.code and (answer.code is not None or not words):
        state, words = "lost", "the job has ended without a word"
    return state, words + _orphan(facts, own, now=now)


def _cancelled(own: Start | None, answer: JobState) -> str:
    """By somebody with the cluster's own tools; the answer is `cancelled` or `cancelled by user 1000`."""
    who = answer.reason.partition("cancelled by ")[2].partition(";")[0]
    by = f" by {who}" if who else ""
    how = f"; it ended with {end_in_words(own)}" if own is not None and own.exit is not None else ""
    return f"cancelled with scancel{by}; `lmscale resume` goes on from its newest checkpoint{how}"


def _orphan(facts: Facts, own: Start | None, *, now: float) -> str:
    """A word about a start that outlives its job, or is not yet known to be dead."""
    if own is None or not _lives(facts, own, now=now):
        return ""
    return f"; {own.host} was heard of {_silence(facts, own, now=now)} ago"


def _without_answer(facts: Facts, own: Start | None, answer: JobState, *, now: float) -> Verdict:
    """The cluster does not answer, or no longer knows the job: what the folder alone can tell."""
    silent = answer.reason or "the cluster did not answer"
    if own is None and facts.stop is not None and answer.raw == "FORGOTTEN":
        return _by_stop(facts, None)  # a job that is out of the queue for minutes
    if own is None:
        return "unknown", silent
    state, why = _by_folder(facts, own, now=now)
    restartable = own.exit is not None and facts.stop is None and not is_final(own.code)
    if state == "lost" or restartable:
        state = "unknown"  # it may be in the queue, to start again
    return state, f"{why}; {silent}" if why else silent


def _living(facts: Facts, start: Start, *, now: float) -> Verdict:
    """A start that goes on, as far as anybody can tell."""
    age_s = now - (facts.beat_time or start.time)
    if facts.alive is False:
        return "running", f"but its process on {start.host} is gone"
    if age_s >= STALE_S:
        return "running", f"but no heartbeat for {_silence(facts, start, now=now)} ({start.host})"
    if start.restart is not None:
        return "waiting", end_in_words(start)
    if facts.stop is not None:
        return "saving", "asked to stop by lmscale stop"
    if start.stuck is not None and when(start.stuck) >= (facts.lines_time or 0.0):
        return "running", start.cause or "stuck"
    return _stepping(facts, start, now=now)


def _stepping(facts: Facts, start: Start, *, now: float) -> Verdict:
    newest = facts.lines[-1].get("step") if facts.lines else None
    if start.from_step is None:
        return "starting", f"for {show_seconds(max(now - start.time, 0))}"
    if not isinstance(newest, int) or newest <= start.from_step:
        return "starting", f"at step {start.from_step}, before its first step"
    idle_s = now - (facts.lines_time or now)
    if idle_s >= _SLOW_S:
        return "running", f"but no new step for {show_seconds(idle_s)}"
    return "running", ""


def _ended(facts: Facts, start: Start) -> Verdict:
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


def _by_stop(facts: Facts, start: Start | None) -> Verdict:
    """RUN/stop of something that has not said how it ended. Words in it are the launcher's: it gave up."""
    if facts.stop:
        return "failed", facts.stop
    return "stopped", f"by lmscale stop, {'without saving' if start else 'before it started'}"


def _lives(facts: Facts, start: Start, *, now: float) -> bool:
    """Whether a start goes on, by its processes where they can be seen and its heartbeat."""
    if start.exit is not None or facts.alive is False:
        return False
    return now - (facts.beat_time or start.time) < STALE_S


def _silence(facts: Facts, start: Start, *, now: float) -> str:
    """How long ago its last heartbeat was."""
    return show_seconds(max(now - (facts.beat_time or start.time), 0))
