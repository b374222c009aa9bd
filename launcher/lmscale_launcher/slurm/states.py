"""Slurm's short form of host names, `n[1-3,07]-ib`, one by one. For where scontrol is missing or refuses.

The states of jobs from what Slurm shows of them. Pure. What is not known never counts as ended.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

from lmscale_launcher.clusters.base import JobState
from lmscale_launcher.slurm import slurm_messages as reasons
from lmscale_launcher.slurm.query import QueueEntry

# Brackets hold no brackets, and a comma inside them does not end a name.
_NAME = re.compile(r"(?:[^,\[\]\s]|\[[^\[\]]*\])+")
_PIECE = re.compile(r"\[([^\]]*)\]|([^\[]+)")
_RANGE = re.compile(r"\s*([0-9]+)(?:-([0-9]+))?\s*")
_MOST = 1 << 20  # Slurm itself knows 65,536 nodes


def expand(text: str) -> list[str]:
    """Every host of a list, in its order. Raises ValueError for text that is no list of hosts.

    Unlike `scontrol show hostnames` of 22.05 it knows text after a bracket: `gpu-[001-003]x`.
    """
    found: list[str] = []
    for name in _names(text):
        parts = [_choices(ranges, name) if ranges else [plain] for ranges, plain in _pieces(name)]
        count = 1
        for choices in parts:
            count *= len(choices)
        if len(found) + count > _MOST:
            raise ValueError(f"{text[:80]!r} names more than {_MOST} hosts")
        found.extend("".join(chosen) for chosen in product(*parts))
    return found


def _names(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        if text[at] == "," or text[at].isspace():
            at += 1
        elif match := _NAME.match(text, at):
            yield match[0]
            at = match.end()
        else:
            raise ValueError(f"{text!r} is not a list of hosts: check its brackets")


def _pieces(name: str) -> Iterator[tuple[str, str]]:
    """(ranges, "") for a bracket, ("", text) for what stands between."""
    for match in _PIECE.finditer(name):
        if match[1] == "":
            raise ValueError(f"{name!r} has an empty bracket")
        yield match[1] or "", match[2] or ""


def _choices(ranges: str, name: str) -> list[str]:
    """`1-3,07`: 1, 2, 3, 07. A number is as wide as the first of its range."""
    found: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{name!r}: {part!r} is neither a number nor a range of numbers")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + _MOST:
            raise ValueError(f"{name!r}: {part!r} is not a range from a smaller to a larger number")
        found.extend(str(number).zfill(len(match[1])) for number in range(first, last + 1))
    return found


_ORDER = ("running", "pending", "unknown", "ended")


def by_job(found: Iterable[QueueEntry]) -> dict[str, list[QueueEntry]]:
    """Grouped by base id: the tasks of an array (17_3) and parts of a heterogeneous job (17+1) together."""
    groups: dict[str, list[QueueEntry]] = {}
    for seen in found:
        groups.setdefault(_base(seen.job), []).append(seen)
    return groups


def find(
    job: str, groups: Mapping[str, Sequence[QueueEntry]], *, name: str = ""
) -> JobState | None:
    """How one job stands, or None where it is not among them. A base id stands for all of its parts.

    With `name`, a job of another name is another job that has got the same number.
    """
    family = [seen for seen in groups.get(_base(job), ()) if _named(seen, name)]
    if job != _base(job):
        family = [seen for seen in family if _covers(seen.job, job)]
    if not family:
        return None
    states = [state_of(seen) for seen in family]
    return min(states, key=lambda state: _ORDER.index(state.standing))


def state_of(seen: QueueEntry) -> JobState:
    """How a job stands by one answer."""
    words = [word.strip() for state in seen.states for word in state.split(",")]
    # CANCELLED by 1000: sacct names who did it. RUNNING+ is a word that sacct has cut short.
    names = [word.split()[0].rstrip("+").upper() for word in words if word]
    if "COMPLETING" in names:  # the state beside it is not final yet: it may be requeued
        return _at_work(seen, "COMPLETING")
    for name in names:
        if name in reasons.WAITING and name != "PENDING":
            return _waiting(seen, name)
    if "PENDING" in names:
        return _waiting(seen, "PENDING")
    for name in names:
        if name in reasons.AT_WORK:
            return _at_work(seen, name)
    for word, name in zip(words, names, strict=False):
        if name in reasons.ENDED:
            return _ended(seen, name, word)
        if name in reasons.ELSEWHERE:
            return JobState("unknown", reasons.ELSEWHERE[name], raw=name)
    told = ", ".join(seen.states)
    return JobState("unknown", f"in a state that is not known here: {told}", raw=told)


def of_chain(states: Sequence[JobState]) -> JobState:
    """How a run stands whose job continued in follow-up jobs, oldest first: the one at work or next."""
    for standing in ("running", "pending"):
        for state in states:
            if state.standing == standing:
                return state
    return states[-1]


def _waiting(seen: QueueEntry, name: str) -> JobState:
    why = reasons.reason(seen.reason)
    words = [reasons.WAITING[name], why.words]
    if name == "PENDING" and why.name == "BeginTime" and seen.restarts is not None:
        words = [
            "requeued, a short pause before it starts again"
            if seen.restarts
            else "its begin time is not reached"
        ]
    return JobState(
        "pending", "; ".join(filter(None, words)), restarts=seen.restarts, raw=_raw(seen, name)
    )


def _at_work(seen: QueueEntry, name: str) -> JobState:
    return JobState(
        "running", reasons.AT_WORK[name], _hosts(seen.nodes),
        restarts=seen.restarts, raw=_raw(seen, name),
    )  # fmt: skip


def _hosts(nodes: str) -> tuple[str, ...]:
    """One by one; a list that cannot be read is shown as it is: how the job stands is known all the same."""
    try:
        return tuple(expand(nodes)) if nodes else ()
    except ValueError:
        return (nodes,)


def _ended(seen: QueueEntry, name: str, word: str) -> JobState:
    words = [reasons.ENDED[name]]
    if match := re.fullmatch(r"CANCELLED by (\S+)", word, re.IGNORECASE):
        words = [f"cancelled by {'root' if match[1] == '0' else f'user {match[1]}'}"]
    why = reasons.reason(seen.reason)
    # A job that was cancelled while it waited keeps the reason of its waiting: no news.
    if name in ("FAILED", "LAUNCH_FAILED") and why.name != "NonZeroExitCode" and why.words:
        words = [why.words]
    return JobState(
        "ended", "; ".join(filter(None, words)), code=_code(seen, name, why.name),
        restarts=seen.restarts, raw=name,
    )  # fmt: skip


def _code(seen: QueueEntry, name: str, why: str) -> int | None:
    """Exit code of the batch script, where it is its own: Slurm writes 0:53 for one it never started."""
    if seen.status is None or why == "JobLaunchFailure" or seen.status == (0, 53):
        return None
    code, signal = seen.status
    if signal:
        return 128 + signal
    return code if code or name == "COMPLETED" else None


def _raw(seen: QueueEntry, name: str) -> str:
    why = reasons.reason(seen.reason).name
    return f"{name} ({why})" if why not in ("", "None") and name == "PENDING" else name


def _named(seen: QueueEntry, name: str) -> bool:
    # scontrol ends a name at its first space.
    return not name or not seen.name or seen.name.split()[:1] == name.split()[:1]


def _base(job: str) -> str:
    return re.split(r"[_+.]", job, maxsplit=1)[0]


def _covers(shown: str, job: str) -> bool:
    """Whether 17_[1-3,7%2], as waiting tasks are shown, includes 17_2."""
    if shown == job:
        return True
    match = re.fullmatch(r"(\d+)_\[([\d,\-:]+)(?:%\d+)?(?:\.\.\.)?\]", shown)
    if match is None or not job.startswith(f"{match[1]}_"):
        return False
    task = job.partition("_")[2]
    for part in match[2].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        if task.isdecimal() and int(task) in range(
            int(first), int(last or first) + 1, int(step or 1)
        ):
            return True
    return False
