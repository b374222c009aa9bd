"""Node 0 before the first start: who has come, and whether these nodes can train together."""

from dataclasses import dataclass, field

from launcher.supervisor.job import Job
from launcher.supervisor.leader import Leader
from launcher.supervisor.meeting import (
    Greeting,
    Lobby,
    cautions,
    disagreement,
    gather,
    nodes_of,
)
from launcher.supervisor.station import Station
from lmscale.errors import ExitCode

_STOPPED = "stopped on request before the ranks had been started"


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why nothing can be started: the code to leave with, and why."""

    code: int
    words: str


@dataclass(frozen=True, slots=True)
class Met:
    """The nodes of this start."""

    leader: Leader
    trouble: Trouble | None = None
    missing: list[int] = field(default_factory=list)  # node numbers
    unfit: dict[str, tuple[str, ...]] = field(default_factory=dict)  # host -> what is wrong with it


def meet(station: Station) -> Met:
    """Wait for the other nodes, if there are any. Raises RetryableError where none of the ports is free."""
    job = station.job
    own = Greeting.of(job)
    if own.nodes == 1:
        unfit = {own.host: own.unfit} if own.unfit else {}
        return Met(_leader(station, None), _unfit(unfit), unfit=unfit)
    lobby = gather(job, station.loop, stopped=lambda: bool(station.signals.take()))
    guests = [lobby.guests[number] for number in sorted(lobby.guests)]
    greetings = [guest.greeting for guest in guests]
    for caution in cautions(own, guests):
        station.output.say(f"careful: {caution}")
    unfit = {one.host: one.unfit for one in [own, *greetings] if one.unfit}
    trouble = _unfit(unfit)
    if lobby.stop_asked:
        return Met(_leader(station, lobby), Trouble(ExitCode.SAVED, _STOPPED), unfit=unfit)
    if lobby.missing:
        trouble = _incomplete(job, lobby)
    elif trouble is None and (why := disagreement(own, greetings)):
        trouble = Trouble(ExitCode.CONFIG, why)
    return Met(_leader(station, lobby), trouble, lobby.missing, unfit)


def _leader(station: Station, lobby: Lobby | None) -> Leader:
    return Leader(
        station.job.host,
        nodes_of(list(lobby.guests.values())) if lobby is not None else [],
        loop=station.loop,
        output=station.output,
        signals=station.signals,
        folder=station.job.folder,
        deadline=station.job.deadline,
    )


def _incomplete(job: Job, lobby: Lobby) -> Trouble:
    numbers = ", ".join(str(number) for number in lobby.missing)
    return Trouble(
        ExitCode.RETRY,
        f"node {numbers} of {job.place.nodes} did not come to {lobby.address} within {job.meeting_s:.0f} s; "
        "see what its log says, and whether it reaches that address",
    )


def _unfit(unfit: dict[str, tuple[str, ...]]) -> Trouble | None:
    if not unfit:
        return None
    words = "; ".join(f"{host}: {' / '.join(reasons)}" for host, reasons in unfit.items())
    return Trouble(ExitCode.RETRY, f"not fit to train: {words}")
