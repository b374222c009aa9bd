"""The newest start of a run, read from its events."""

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.jobs.facts import Event, when
from launcher.jobs.record import JobRecord

# Clocks of a login node and of a compute node may differ by this much; a job of this host has one clock.
_SKEW_S = {"slurm": 5.0}


@dataclass(frozen=True, slots=True)
class Start:
    """What is known of a start. Its owner (a supervisor, or a lone rank 0) outlives its ranks."""

    name: str
    time: float
    host: str  # of its owner, for people
    by_hand: bool
    nodes: tuple[str, ...]  # hosts of all its nodes, where it says so
    from_step: int | None  # None: it has not loaded yet
    exit: Event | None  # written by its owner: it is over
    restart: Event | None  # written by its owner: it is over, and a next one follows
    stuck: Event | None
    rank_exit: Event | None  # how rank 0 says it ended: the more telling words
    cause: str  # what the supervisor blames: a stuck rank, a lost node; may be empty
    first_dead: str  # which rank died first; may be empty

    @property
    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        code = self.exit.get("code") if self.exit is not None else None
        return code if isinstance(code, int) else None


def newest_start_of(events: Sequence[Event]) -> Start | None:
    """The start that these events of one file tell of; None without any.

    A file holds several where a name was given twice: the last one counts.
    """
    own = _last_one(events)
    if not own:
        return None
    first = own[0]
    last = {(_writer(event) == _writer(first), event.get("kind")): event for event in own}
    attempt = last.get((False, "attempt")) or last.get((True, "attempt"))
    from_step = attempt.get("from_step") if attempt is not None else None
    nodes = first.get("nodes")
    return Start(
        name=str(first.get("start", "")),
        time=when(first),
        host=str(first.get("host", "")).partition("/")[0],
        by_hand=bool(first.get("by_hand")),
        nodes=tuple(map(str, nodes)) if isinstance(nodes, list) else (),
        from_step=from_step if isinstance(from_step, int) else None,
        exit=last.get((True, "exit")),
        restart=last.get((True, "restart")),
        stuck=last.get((True, "stuck")) or last.get((False, "stuck")),
        rank_exit=last.get((False, "exit")),
        cause=_cause(own),
        first_dead=_first_dead(own),
    )


def belongs(start: Start, record: JobRecord) -> bool:
    """Whether this start is one of this submission, by its name or, for other names, by its time."""
    if start.name.startswith(f"{record.kind}-{record.job}-"):
        return True
    return not start.by_hand and start.time >= record.time - _SKEW_S.get(record.kind, 0.0)


def _cause(events: Sequence[Event]) -> str:
    """What the supervisor blames: the most telling of its events, and of several alike the first."""
    first = {str(event.get("kind")): event for event in reversed(events)}
    if found := first.get("stuck"):
        return str(found.get("reason") or "")
    if found := first.get("bad_node"):
        reasons = found.get("reasons")
        told = "; ".join(map(str, reasons)) if isinstance(reasons, list) else str(reasons or "")
        return f"{found.get('node')} failed its check: {told}"
    if found := first.get("lost_node"):
        name = found.get("node") or f"node {found.get('number')}"
        return f"{name} is lost: {found.get('reason')}"
    return ""


def _first_dead(events: Sequence[Event]) -> str:
    for event in events:
        if event.get("kind") == "died":
            where = f" on {event['node']}" if event.get("node") else ""
            return f"rank {event.get('rank')}{where}"
    return ""


def _last_one(events: Sequence[Event]) -> Sequence[Event]:
    """From the last `start` that follows the end of another one in the same file."""
    begin, owner, over = 0, None, False
    for index, event in enumerate(events):
        kind = event.get("kind")
        if owner is None or (kind == "start" and over):
            begin, owner, over = index, _writer(event), False
        elif kind == "exit" and _writer(event) == owner:
            over = True
    return events[begin:]


def _writer(event: Event) -> tuple[object, object]:
    return event.get("host"), event.get("pid")
