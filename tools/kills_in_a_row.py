"""SIGKILL one rank again and again under one supervisor: how long until it trains again, and what is left over.

python tools/kills_in_a_row.py --kills 20        docs/restarts.md, a part of `make soak`
"""

import argparse
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import ROOT, facts, provenance, table, write_page
from small_jobs import start
from strike import abandoned, kill_all, shared_memory

from lmscale.config.yaml import parse
from tests.support.jobs import Job, descendants, prepare_corpus, rank_pids, small_run, wait_until

WITHIN_S = 15.0  # to be training again, with the smoke model on two cores
STEPS = 100_000  # never reached


@dataclass(frozen=True)
class Outcome:
    """What was seen."""

    recovery_s: list[float]  # from each kill to the first step of the next start
    problems: list[str]


def run_file(corpus: Path, kills: int) -> dict[str, Any]:
    """The smoke model; every checkpoint that moves gives the budget of restarts back."""
    smoke = parse((ROOT / "configs" / "runs" / "smoke.yaml").read_text(), name="yaml").value
    run = small_run(
        corpus,
        train={"steps": STEPS, "seq_len": 256, "micro_batch_size": 4},
        data={"trace": False},
        eval={"every_steps": None},
        checkpoint={"every_steps": 10, "keep": 2},
        cluster={"max_restarts": kills, "ranks_per_node": 2},
    )
    return {**run, "model": smoke["model"]}


class Row:
    """One supervisor and its ranks, killed in turn."""

    def __init__(self, folder: Path, kills: int) -> None:
        self.job = Job(folder)
        self.job.write(run_file(prepare_corpus(folder), kills))
        self.started = start(self.job)
        self.seen: set[int] = set()  # every process that the supervisor ever had
        self.ports: set[int] = set()  # where ranks have met

    @property
    def step(self) -> int:
        """The last one that is recorded."""
        lines = self.job.lines()
        return int(lines[-1]["step"]) if lines else 0

    def kill(self, chooser: random.Random) -> float:
        """Kill one rank of the present start; seconds until the next one has trained a step."""
        supervisor = self.started.process.pid
        ranks = [pid for pid in rank_pids(supervisor) if pid not in self.seen]
        self.seen |= set(descendants(supervisor))
        self.ports |= {_port(pid) for pid in ranks}
        metrics = self.job.run_dir / "metrics.jsonl"
        inode = metrics.stat().st_ino  # a new attempt cuts the lines by renaming a copy
        os.kill(chooser.choice(ranks), signal.SIGKILL)
        struck = time.monotonic()
        wait_until(lambda: metrics.stat().st_ino != inode, 90, "a new attempt")
        cut_at = self.step
        wait_until(lambda: self.step > cut_at, 60, "a step of the new attempt")
        return time.monotonic() - struck

    def end(self) -> Iterator[str]:
        """Stop it; what is left over although it should not be."""
        self.seen |= set(descendants(self.started.process.pid))
        self.started.process.send_signal(signal.SIGTERM)
        code = self.started.process.wait(60)
        if code != 85:
            yield f"the supervisor ended with {code} instead of 85"
        if left := [pid for pid in self.seen if Path(f"/proc/{pid}").exists()]:
            yield f"processes {left} outlived it"
        for port in sorted(self.ports):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    yield f"port {port} still answers"


def kill_in_a_row(
    folder: Path, kills: int, seed: int, *, say: Callable[[str], object] = print
) -> Outcome:
    """So many kills, each some steps after the run has come back from the one before."""
    chooser, memory = random.Random(seed), shared_memory()
    row, recovery = Row(folder, kills), list[float]()
    try:
        wait_until(lambda: row.step >= 12, 120, "the first steps")
        for number in range(1, kills + 1):
            recovery.append(row.kill(chooser))
            say(f"kill {number}: training again after {recovery[-1]:.1f} s")
            beyond = row.step + 12  # a checkpoint lies between
            wait_until(lambda: row.step >= beyond, 90, "more steps")  # noqa: B023 called at once
        problems = list(row.end())
    finally:
        kill_all(folder)
    if left := abandoned(shared_memory() - memory):
        problems.append(f"/dev/shm: {sorted(left)} were left")
    return Outcome(recovery, problems)


def _port(pid: int) -> int:
    env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(item[12:]) for item in env if item.startswith(b"MASTER_PORT=")), 0)


def page(outcome: Outcome, seed: int) -> Iterator[str]:
    """docs/restarts.md."""
    times = outcome.recovery_s
    yield "# One rank killed, again and again"
    yield (
        "Written by `make soak`; do not edit. The smoke model on two ranks; one rank, chosen at random, gets SIGKILL "
        "some steps after the run has come back from the kill before. The supervisor ends and starts all again. "
        "Seconds from the kill to the first step of the next attempt: they hold Python's and torch's imports, the "
        "meeting of the ranks and the load of the newest checkpoint."
    )
    bad = (
        f"**{'; '.join(outcome.problems)}**"
        if outcome.problems
        else "no process, port or shared memory left"
    )
    yield f"**{len(times)} kills: median {statistics.median(times):.1f} s, longest {max(times):.1f} s; {bad}.**"
    yield facts({**provenance(), "seed": seed})
    yield table(("kill", "seconds"), [(i, f"{s:.1f}") for i, s in enumerate(times, start=1)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "restarts.md")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_in_a_row(Path(folder), args.kills, args.seed)
    write_page(args.page, page(outcome, args.seed))
    print(*outcome.problems, sep="\n")
    return int(bool(outcome.problems) or max(outcome.recovery_s) > WITHIN_S)


if __name__ == "__main__":
    sys.exit(main())
