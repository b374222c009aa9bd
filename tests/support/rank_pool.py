"""Resident gloo ranks for tests: a Python with torch costs seconds to start, a case milliseconds.

    def sums(x):                      # at the top level of a test module, so that it pickles
        return sum_over(torch.tensor(x + dist.get_rank())).item()

    def test_sum(ranks):
        assert ranks(2)(sums, 1) == [3, 3]

`ranks(N)` is a Pool of N ranks that share one default group for the whole session. A case that
fails, hangs or kills a rank takes its pool with it; the next case starts another.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support.ports import free_port

CASE_DEADLINE_S = 90.0
GROUP_DEADLINE_S = 45.0  # of collectives: below the case's, so that a hang names its collective
START_DEADLINE_S = 120.0
SETTLE_S = 2.0


class CaseFailed(AssertionError):
    """What went wrong on which ranks, with their tracebacks."""


@dataclass(frozen=True)
class Died:
    """Stands for the result of a rank that the case was expected to kill."""

    exit_code: int  # -n: by signal n


class Pool:
    """N processes that run one case after another. `bare`: without a process group.

    In a bare pool a function is called as function(world, *args), with a fresh rendezvous port.
    """

    def __init__(self, size: int, *, bare: bool = False) -> None:
        self.size = size
        self._bare = bare
        self._cases = 0
        self._ranks: list[tuple[mp.process.BaseProcess, Connection]] = []
        self._stacks = Path()

    def __call__(
        self,
        function: Callable[..., Any],
        *args: Any,
        deadline_s: float = CASE_DEADLINE_S,
        deaths: Sequence[int] = (),
    ) -> list[Any]:
        """function(*args) on every rank; the results in rank order.

        `deaths` are the ranks that must die in this case; a Died stands for their results.
        """
        if not self._ranks:
            self._start()
        self._cases += 1
        # Paths travel along: the case may live in a folder pytest entered after the ranks started.
        case = pickle.dumps((sys.path, f"127.0.0.1:{free_port()}", self._cases, function, args))
        for _, pipe in self._ranks:
            pipe.send_bytes(case)
        answers = self._collect(time.monotonic() + deadline_s, set(deaths))
        return self._judge(answers, function.__name__, deadline_s, set(deaths))

    def close(self) -> None:
        """Kill the ranks. Nothing of theirs is worth a farewell."""
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        if self._ranks:
            shutil.rmtree(self._stacks)
        self._ranks = []

    def _start(self) -> None:
        spawn = mp.get_context("spawn")
        self._stacks = Path(tempfile.mkdtemp(prefix="stacks-"))
        start = (self.size, f"127.0.0.1:{free_port()}", self._bare, str(self._stacks))
        for rank in range(self.size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_rank_main, args=(theirs, os.getpid(), rank, *start), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        answers = self._collect(time.monotonic() + START_DEADLINE_S, set())
        self._judge(answers, "start of the pool", START_DEADLINE_S, set())

    def _collect(self, deadline: float, deaths: set[int]) -> list[Any]:
        """One answer a rank: ("ok", value), ("error", text), ("died", code) or None for silence.

        After an unexpected death or an error the others get SETTLE_S to report theirs.
        """
        answers: list[Any] = [None] * self.size
        while missing := [rank for rank in range(self.size) if answers[rank] is None]:
            pipes = {self._ranks[rank][1]: rank for rank in missing}
            ready = wait(list(pipes), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._dump_stacks(missing)
                break
            for pipe in ready:
                rank = pipes[pipe]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(self._ranks[rank][1].recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._ranks[rank][0].join()
                    answers[rank] = ("died", self._ranks[rank][0].exitcode)
                if answers[rank][0] != "ok" and rank not in deaths:
                    deadline = min(deadline, time.monotonic() + SETTLE_S)
        return answers

    def _judge(
        self, answers: list[Any], name: str, deadline_s: float, deaths: set[int]
    ) -> list[Any]:
        problems = []
        for rank, answer in enumerate(answers):
            match answer:
                case None:
                    stack = self._stack_file(rank)
                    text = stack.read_text() if stack.exists() else ""
                    problems.append(
                        f"rank {rank}: no answer (deadline {deadline_s:.0f} s), at\n{text}"
                    )
                case ("error", text):
                    problems.append(f"rank {rank}: {text}")
                case ("died", code) if rank not in deaths:
                    problems.append(f"rank {rank}: died with exit code {code}")
                case ("ok", _) if rank in deaths:
                    problems.append(f"rank {rank}: was expected to die and did not")
        if problems or deaths:
            self.close()
        if problems:
            raise CaseFailed(f"{name} on {self.size} ranks:\n" + "\n".join(problems))
        return [Died(value) if kind == "died" else value for kind, value in answers]

    def _dump_stacks(self, silent: Sequence[int]) -> None:
        for rank in silent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._ranks[rank][0].pid or 0, signal.SIGUSR1)
        time.sleep(0.3)

    def _stack_file(self, rank: int) -> Path:
        return self._stacks / f"rank-{rank}.txt"


def _rank_main(
    pipe: Connection,
    parent: int,
    rank: int,
    size: int,
    master: str,
    bare: bool,
    stacks: str,
) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives its pytest
    if os.getppid() != parent:
        os._exit(1)
    with open(f"{stacks}/rank-{rank}.txt", "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file)
        os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(size))
        try:
            _serve(pipe, rank, size, master, bare)
        except BaseException:
            _send(pipe, ("error", traceback.format_exc()))


def _serve(pipe: Connection, rank: int, size: int, master: str, bare: bool) -> None:
    import torch

    from lmscale.base.world import World
    from lmscale.distributed.process_group import distributed

    def world(master: str, start: str) -> World:
        return World(rank, rank, size, size, master if size > 1 else None, start)

    group = distributed(
        world(master, "resident"), device=torch.device("cpu"), timeout_s=GROUP_DEADLINE_S
    )
    with contextlib.nullcontext() if bare else group:
        _send(pipe, ("ok", None))
        while True:
            try:
                path, port, number, function, args = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            except Exception:  # the function cannot be imported here
                _send(pipe, ("error", traceback.format_exc()))
                continue
            sys.path[:] = path
            first = (world(port, f"case-{number}"),) if bare else ()
            try:
                answer = ("ok", function(*first, *args))
            except BaseException:
                answer = ("error", traceback.format_exc())
            _send(pipe, answer)


def _send(pipe: Connection, answer: tuple[str, Any]) -> None:
    try:
        data = pickle.dumps(answer)
    except Exception:  # a result that does not pickle is the case's error, not the pool's
        data = pickle.dumps(("error", traceback.format_exc()))
    pipe.send_bytes(data)
