"""A node that is not node 0: comes to the meeting, runs each round and leaves with the code of all."""

from launcher.supervisor import crew
from launcher.supervisor.guest import Guest, Leave
from launcher.supervisor.meeting import find
from launcher.supervisor.station import Station
from launcher.supervisor.team import parted
from lmscale.errors import ExitCode, decisive

_TURN_S = 0.5


def follow(station: Station) -> int:
    """Do as node 0 says. Raises RetryableError where it is not found."""
    channel = find(station.job, station.loop, stopped=lambda: bool(station.signals.take()))
    if channel is None:
        return ExitCode.SAVED  # stopped on request before there was anything to save
    guest = Guest(channel, station.loop, station.signals)
    try:
        return _rounds(station, guest)
    finally:
        guest.close()


def _rounds(station: Station, guest: Guest) -> int:
    codes: dict[int, int] = {}
    while True:
        one = guest.decision()
        if isinstance(one, Leave):
            if one.words:
                station.output.say(one.words)
            return one.code
        if guest.lost:
            station.output.say(
                f"node 0 is lost: {guest.lost}. This node leaves, to be started again"
            )
            return parted(decisive(codes.values()))
        if one is not None:
            codes = crew.run(station, one, guest)
            guest.ended(codes)
            continue
        station.loop.turn(_TURN_S)
        for number in station.signals.take():
            guest.stop(number)
        guest.tick(None)
