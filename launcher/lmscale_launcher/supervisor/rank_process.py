"""One rank as a process: its environment, its process group, and that it never outlives its parent."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import termios
import tty
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lmscale.base.env import without_torchrun
from lmscale.base.listener import RENDEZVOUS_FD
from lmscale.base.proc import death_signal, process_state
from lmscale.run_folder.rank_progress import PULSE_FD, STACK_FD, new_descriptors
from lmscale_launcher.gpus import count_cores


@dataclass(frozen=True, slots=True)
class NodeTopology:
    """Which ranks this host runs, and where all ranks meet."""

    num_ranks: int  # on this host
    nodes: int = 1
    node: int = 0
    master: str | None = None  # host:port where the supervisors of several nodes meet
    ranked: bool = True  # False: the child is no rank, but something that starts ranks (mpirun)

    @property
    def ranks(self) -> range:
        """Global numbers of this host's ranks."""
        return range(self.node * self.num_ranks, (self.node + 1) * self.num_ranks)

    def environment(
        self, env: Mapping[str, str], *, rank: int, port: int, start: str
    ) -> dict[str, str]:
        """The environment of one rank: torchrun's variables, and ours. `port`: of node 0, for the ranks."""
        if not self.ranked:
            return {**env, "LMSCALE_START": start}
        address = (self.master or "").rpartition(":")[0].strip("[]") if self.nodes > 1 else ""
        threads = str(max(1, count_cores() // self.num_ranks))
        return {
            "OMP_NUM_THREADS": threads,
            **without_torchrun(env),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank - self.ranks.start),
            "WORLD_SIZE": str(self.nodes * self.num_ranks),
            "LOCAL_WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": address or "127.0.0.1",
            "MASTER_PORT": str(port),
            "LMSCALE_START": start,
            "PYTHONUNBUFFERED": "1",
        }


@dataclass(slots=True)
class RankProcess:
    """A started rank."""

    rank: int
    process: "subprocess.Popen[bytes]"
    output: int  # descriptor to read what it writes
    terminal: int | None = None  # the one whose size its own terminal follows
    pulse: int | None = (
        None  # descriptor of what it tells about its progress, see lmscale/run_folder/rank_progress.py
    )
    stack: int | None = None  # and of what faulthandler writes on SIGQUIT
    ended: set[int] = field(default_factory=set)  # signals sent to end it because of a peer

    @property
    def pid(self) -> int:
        """Its pid, and its process group's number."""
        return self.process.pid

    def has_exited(self) -> bool:
        """Whether it is dead but not yet reaped, so that its process group's number is still its own."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def reap(self) -> int:
        """Kill what is left of its process group and return its exit code, 128+n for a signal."""
        self.kill()
        code = self.process.wait()
        return code if code >= 0 else 128 - code

    def follow_size(self) -> None:
        """Give the rank's terminal the rows and columns of the user's."""
        if self.terminal is not None:
            _copy_size(self.terminal, self.output)

    def send(self, number: int) -> None:
        """A signal to the rank itself; what it has started is its own affair."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def state(self) -> str:
        """The kernel's letter for it: R, S, D (waiting for a disk), T (stopped), ...; empty when gone."""
        return process_state(self.pid)

    def close(self) -> None:
        """Let go of the memory it shared with us."""
        for descriptor in (self.pulse, self.stack):
            if descriptor is not None:
                os.close(descriptor)
        self.pulse = self.stack = None

    def kill(self) -> None:
        """SIGKILL to the rank and everything in its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def spawn(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    rank: int,
    terminal: int | None,
    shares: bool = True,
    listener: socket.socket | None = None,
) -> RankProcess:
    """Start a rank. Call it from the main thread of a process without other threads.

    PR_SET_PDEATHSIG fires when the starting thread ends, and code between fork and exec is safe in a
    process with one thread only. With `terminal` its output goes through a terminal of that one's
    size. It `shares` memory in which it tells about its progress, unless it is no rank. Rank 0
    inherits the `listener` at which all meet; ours stays open.
    """
    reading, writing = os.openpty() if terminal is not None else os.pipe()
    shared = new_descriptors() if shares else {}
    inherits = shared | ({} if listener is None else {RENDEZVOUS_FD: listener.fileno()})
    try:
        if terminal is not None:
            tty.setraw(writing)  # no translation of line ends
            _copy_size(terminal, writing)
        process = subprocess.Popen(
            command,
            env={**env, **{name: str(number) for name, number in inherits.items()}},
            pass_fds=list(inherits.values()),
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            process_group=0,
            preexec_fn=death_signal(os.getpid()),  # noqa: PLW1509 single-threaded, see above
        )
    except BaseException:
        for descriptor in (reading, *shared.values()):
            os.close(descriptor)
        raise
    finally:
        os.close(writing)
    os.set_blocking(reading, False)
    return RankProcess(
        rank, process, reading, terminal, pulse=shared.get(PULSE_FD), stack=shared.get(STACK_FD)
    )


def _copy_size(terminal: int, other: int) -> None:
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
        fcntl.ioctl(other, termios.TIOCSWINSZ, size)
