"""How a run stands, in words users know: a pure function of its folder and of its cluster's answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from launcher.jobs.cluster import JobState
from launcher.jobs.facts import Event, Facts, when
from launcher.jobs.start import Start, belongs, newest_start_of
from launcher.jobs.verdict import State, verdict

ACTIVE: frozenset[State] = frozenset({"pending", "starting", "running", "saving", "waiting"})
ENDED: frozenset[State] = frozenset({"stopped", "finished", "failed", "lost"})
_AT_WORK: frozenset[State] = frozenset({"running", "saving"})
_SAVES = 10  # behind the time left


@dataclass(frozen=True, slots=True)
class Standing:
    """One run, as `lmscale status` shows it. None: not known, or nothing to tell."""

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
        """Whether somebody or something is at it: it is not over."""
        return self.state in ACTIVE

    @property
    def ended(self) -> bool:
        """Whether nothing goes on by itself. An unknown standing is neither active nor ended."""
        return self.state in ENDED

    def in_words(self) -> str:
        """State and reason as one sentence."""
        state = "waiting to start again" if self.state == "waiting" else self.state
        if self.state == "running" and self.reason.startswith("but "):
            return f"running, {self.reason}"
        return f"{state}: {self.reason}" if self.reason else state


def judge(facts: Facts, answer: JobState | None, *, now: float, name: str = "") -> Standing:
    """The standing of a run. `answer`: what its cluster says of the newest job, None without a job."""
    start = newest_start_of(facts.events)
    state, reason = verdict(facts, start, answer, now=now)
    lines = _of_this_start(facts.lines, start)
    seconds = (_pace(facts.events) or _seconds_a_step(lines)) if state in _AT_WORK else None
    step = _step(facts, start)
    total = facts.planned_steps
    record, saved = facts.record, facts.saved
    left = max(total - step, 0) if total is not None and step is not None else None
    return Standing(
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


def _step(facts: Facts, start: Start | None) -> int | None:
    """Steps done: by the metrics, or where the newest start goes on from before its first line."""
    recorded = facts.lines[-1].get("step") if facts.lines else None
    if isinstance(recorded, int):
        return recorded
    return start.from_step if start is not None else (0 if facts.record is not None else None)


def _of_this_start(lines: Sequence[Event], start: Start | None) -> list[Event]:
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
    """Starts that no person made. The first is none, whoever made it."""
    return sum(not (start.get("by_hand") or start.get("fresh")) for start in starts[1:])


def _nodes(facts: Facts, start: Start | None, answer: JobState | None) -> int | None:
    record = facts.record
    if answer is not None and answer.standing == "running" and answer.hosts:
        # Of an mpirun with a host file only its own host is known.
        few = record is not None and record.kind == "mpi" and len(answer.hosts) < record.nodes
        return record.nodes if record is not None and few else len(answer.hosts)
    if start is not None and (record is None or not belongs(start, record)):
        return len(start.nodes) or 1
    goes_on = start is not None and start.exit is None and start.restart is None
    if start is not None and goes_on and record is not None and record.kind == "slurm":
        return len(start.nodes) or record.nodes  # of an elastic job, while its cluster is silent
    return record.nodes if record is not None else None


def _hosts(start: Start | None, answer: JobState | None, *, running: bool) -> tuple[str, ...]:
    if answer is not None and answer.hosts:
        return answer.hosts
    if not running or start is None:
        return ()
    return start.nodes or ((start.host,) if start.host else ())


def _code(facts: Facts, start: Start | None, answer: JobState | None) -> int | None:
    """How it ended: the newest start's own word, else the cluster's."""
    of_job = start is not None and (facts.record is None or belongs(start, facts.record))
    if start is not None and start.code is not None and (of_job or answer is None):
        return start.code
    return answer.code if answer is not None and answer.standing == "ended" else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
