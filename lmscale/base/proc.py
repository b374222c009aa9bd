"""Is that process still the one that wrote its pid down? Linux's answer, from /proc."""

import os
import socket
from pathlib import Path


def this_host() -> str:
    """This host and pid namespace: containers of one host name do not see each other's pids."""
    try:
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}/{space}"


def started_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it is dead or a zombie.

    Kept beside a pid it tells a process from a later one that got the same number.
    """
    try:
        # The name stands in parentheses and may hold any character, so count from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, ticks: int | None) -> bool:
    """Whether the process that had this pid and start time still runs."""
    now = started_ticks(pid)
    return now is not None and (ticks is None or now == ticks)
