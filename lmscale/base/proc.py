"""Processes and interfaces of this host: identity, liveness, children, death signals.

psutil answers where /proc does not exist; it is imported only then, and for interfaces.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_CLOCK_TICKS = 100  # per second, where psutil answers instead of /proc
_PROC = Path("/proc/self/stat")


# ---- identity ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, told apart from a later one that has got the same pid."""

    pid: int
    ticks: int | None  # start time in clock ticks since boot; None: not known

    @classmethod
    def of(cls, pid: int | None = None) -> "ProcessIdentity":
        """The process that has this pid now; None: the calling process."""
        pid = os.getpid() if pid is None else pid
        return cls(pid, started_ticks(pid))

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return is_alive(self.pid, self.ticks)


def this_host() -> str:
    """This host and pid namespace: containers of one host name do not see each other's pids."""
    try:
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}/{space}"


def started_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it is dead or a zombie."""
    fields = _stat_fields(pid)
    if fields is None:
        return _started_by_psutil(pid) if not _PROC.exists() else None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, ticks: int | None) -> bool:
    """Whether the process that had this pid and start time still runs. None: any start time."""
    now = started_ticks(pid)
    return now is not None and (ticks is None or now == ticks)


def process_state(pid: int) -> str:
    """The kernel's letter for a process: R, S, D (waiting for a disk), T (stopped), ...; "": gone."""
    fields = _stat_fields(pid)
    return fields[0] if fields else ""


def children(pid: int | None = None) -> set[int]:
    """Pids of the direct children of the main thread of a process (None: this one), zombies included.

    Empty where neither the kernel's list nor psutil can answer.
    """
    pid = os.getpid() if pid is None else pid
    try:
        return {
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        }
    except (OSError, ValueError):  # a kernel without CONFIG_PROC_CHILDREN, or no /proc
        psutil = _psutil()
        try:
            return {child.pid for child in psutil.Process(pid).children()}
        except psutil.Error:
            return set()


# ---- end of a parent -----------------------------------------------------------------------------


def die_with_parent(parent: int | None = None, *, exit_code: int = 128 + signal.SIGKILL) -> None:
    """Let the kernel kill this process when its parent dies, however that dies. Linux only.

    `parent` is the expected parent; a process that has lost it already exits with `exit_code`. The
    signal is sent when the *thread* that has started this process ends. Children do not inherit it.
    """
    death_signal(os.getppid() if parent is None else parent, exit_code=exit_code)()


def death_signal(parent: int, *, exit_code: int = 128 + signal.SIGKILL) -> Callable[[], None]:
    """`die_with_parent` as a function to call between fork and exec: nothing is imported in it."""
    libc = _libc() if sys.platform == "linux" else None

    def apply() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(exit_code)

    return apply


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parents end. Linux only."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


# ---- interfaces ----------------------------------------------------------------------------------


def interfaces() -> dict[str, list[str]]:
    """IPv4 addresses of each interface that is up, in the system's order; without the loopback."""
    psutil = _psutil()
    up = {name for name, facts in psutil.net_if_stats().items() if facts.isup}
    found: dict[str, list[str]] = {}
    for name, addresses in psutil.net_if_addrs().items():
        own = [
            entry.address
            for entry in addresses
            if entry.family == socket.AF_INET and not entry.address.startswith("127.")
        ]
        if name in up and own:
            found[name] = own
    return found


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None where they cannot be read."""
    try:
        # The name is in parentheses and may contain any character, so count from the last one.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields if len(fields) > 19 else None


def _started_by_psutil(pid: int) -> int | None:
    psutil = _psutil()
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return int(process.create_time() * _CLOCK_TICKS)
    except psutil.Error:
        return None


@cache
def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _psutil() -> Any:
    import psutil  # 25 ms of CPU

    return psutil
