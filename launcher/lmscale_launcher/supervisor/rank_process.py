"""One rank as a process: its environment, its process group, and its death with its parent."""

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
from lmscale.run_folder.status_file import SUPERVISED
from lmscale_launcher.gpus import count_cores


@dataclass(frozen=True, slots=True)
class NodeTopology:
    """Which ranks this host runs, and where the supervisors of several nodes connect."""

    num_ranks: int  # on this host
    nodes: int = 1
    node: int = 0
    master: str | None = None  # host:port at which the supervisor of node 0 listens
    ranked: bool = True  # False: the child process is not a rank but starts ranks (mpirun)

    @property
    def ranks(self) -> range:
        """Global numbers of this host's ranks."""
        return range(self.node * self.num_ranks, (self.node + 1) * self.num_ranks)

    def environment(
        self, env: Mapping[str, str], *, rank: int, port: int, start: str
    ) -> dict[str, str]:
        """The environment of one rank: the variables of torchrun and of lmscale.

        `port` is the port of node 0 at which the ranks connect.
        """
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
            SUPERVISED: "1",
            "PYTHONUNBUFFERED": "1",
        }


@dataclass(slots=True)
class RankProcess:
    """A started rank."""

    rank: int
    process: "subprocess.Popen[bytes]"
    output: int  # descriptor from which its output is read
    terminal: int | None = None  # descriptor of the user's terminal, whose size its own one copies
    # Shared memory with the progress of the rank (lmscale/run_folder/rank_progress.py), and with the stack that
    # faulthandler writes on SIGQUIT.
    progress_fd: int | None = None
    stack_fd: int | None = None
    peer_signals: set[int] = field(default_factory=set)  # sent to end it after a peer had died

    @property
    def pid(self) -> int:
        """Its pid, which is also the number of its process group."""
        return self.process.pid

    def has_exited(self) -> bool:
        """Whether it is dead but not yet reaped; until then its process group's number is not reused."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def reap(self) -> int:
        """Kill the rest of its process group and return its exit code, 128+n for signal n."""
        self.kill()
        code = self.process.wait()
        return code if code >= 0 else 128 - code

    def follow_size(self) -> None:
        """Give the rank's terminal the rows and columns of the user's."""
        if self.terminal is not None:
            _copy_size(self.terminal, self.output)

    def send(self, number: int) -> None:
        """Send a signal to the rank only, not to processes that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def state(self) -> str:
        """Its process state: R, S, D (waiting for a disk), T (stopped), ...; empty after its end."""
        return process_state(self.pid)

    def close(self) -> None:
        """Close the memory that it shares with this process."""
        for descriptor in (self.progress_fd, self.stack_fd):
            if descriptor is not None:
                os.close(descriptor)
        self.progress_fd = self.stack_fd = None

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
    shares_progress: bool = True,
    listener: socket.socket | None = None,
) -> RankProcess:
    """Start a rank. Call it from the main thread of a process without other threads.

    PR_SET_PDEATHSIG fires when the starting thread ends, and code between fork and exec is safe in a
    process with one thread only. With `terminal` its output goes through a pseudo-terminal of the same
    size. With `shares_progress` it inherits memory for its progress and its stack. Rank 0 inherits the
    `listener` of the rendezvous of the ranks; the copy of this process stays open.
    """
    reading, writing = os.openpty() if terminal is not None else os.pipe()
    shared = new_descriptors() if shares_progress else {}
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
        rank,
        process,
        reading,
        terminal,
        progress_fd=shared.get(PULSE_FD),
        stack_fd=shared.get(STACK_FD),
    )


def _copy_size(terminal: int, other: int) -> None:
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
        fcntl.ioctl(other, termios.TIOCSWINSZ, size)
