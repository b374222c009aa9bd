"""Two supervisors as two nodes on this host, 2 ranks each: real training lives through what happens to nodes."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lmscale_launcher.doctor.host import SHM, unused
from tests.support.jobs import (
    LMSCALE,
    Job,
    clean_env,
    processes_of,
    rank_pids,
    small_run,
    wait_until,
)
from tests.support.ports import free_port

STEPS = 40
SAME = ("step", "loss", "grad_norm", "position", "tokens", "lr")
RESTARTS = ("cluster.max_restarts=3",)


@dataclass
class Pair:
    """One run on two nodes."""

    job: Job
    nodes: dict[int, "subprocess.Popen[str]"] = field(default_factory=dict)

    def start(self, name: str, *overrides: str, **env: str) -> "Pair":
        master = f"127.0.0.1:{free_port()}"
        for node in (1, 0):
            given = {
                "LMSCALE_NODES": "2", "LMSCALE_NODE_RANK": str(node), "LMSCALE_MASTER": master,
                "LMSCALE_START": name, "SLURMD_NODENAME": f"n{node}", **env,
            }  # fmt: skip
            self.nodes[node] = subprocess.Popen(
                [str(LMSCALE), "train", f"{self.job.name}.yaml", "cluster.nodes=2", *overrides,
                 "--nproc", "2"],
                cwd=self.job.folder, env=clean_env(**given), text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self

    def wait_for_step(self, step: int) -> None:
        self.job.wait_for_step(step, self.nodes[0])

    def end(self, timeout: float = 90) -> tuple[list[int], list[str]]:
        said = [self.nodes[node].communicate(timeout=timeout)[0] for node in (0, 1)]
        return [self.nodes[node].returncode for node in (0, 1)], said

    def starts(self) -> list[str]:
        """Names of the supervisors' starts; rank 0 reports each of them too."""
        begun = [event for event in self.job.events() if event["kind"] == "start"]
        begun.sort(key=lambda event: event["time"])
        return list(dict.fromkeys(event["start"] for event in begun))

    def loaded(self, start: str) -> float | None:
        """When this start had loaded its checkpoint."""
        found = [e for e in self.job.events() if (e["kind"], e["start"]) == ("attempt", start)]
        return found[0]["time"] if found else None

    def event(self, kind: str) -> dict[str, Any]:
        return next(event for event in self.job.events() if event["kind"] == kind)


@pytest.fixture(scope="module")
def run(corpus: Path) -> dict[str, Any]:
    return small_run(corpus, train={"steps": STEPS}, checkpoint={"every_steps": 7})


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, run: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[int, tuple[int, ...]]]:
    """Lines and samples of four ranks on one node."""
    job = Job(tmp_path_factory.mktemp("alone"))
    job.write(run)
    done = job.train("--nproc", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    return job.lines(), job.trace()


@pytest.fixture
def pair(job: Job, run: dict[str, Any]) -> Iterator[Pair]:
    job.write(run)
    before = left_in_memory()
    yield Pair(job)
    left = left_in_memory() - before
    if left:  # other programs make files and open them a moment later
        time.sleep(2)
    assert not left & left_in_memory()


def left_in_memory() -> set[Path]:
    """Without what killed ranks of mpirun leave there, which other tests may be killing now."""
    return {path for path in unused(SHM) if "_segment." not in path.name}


def check_same(
    pair: Pair, undisturbed: tuple[list[dict[str, Any]], dict[int, tuple[int, ...]]]
) -> None:
    """Every step once and bitwise the same; every sample once."""
    lines, trace = undisturbed
    assert [{k: line[k] for k in SAME} for line in pair.job.lines()] == [
        {k: line[k] for k in SAME} for line in lines
    ]
    assert pair.job.trace() == trace


@pytest.mark.slow
def test_two_nodes_train_as_one_does_and_live_through_a_killed_and_a_stopped_rank(
    pair: Pair, undisturbed: tuple[list[dict[str, Any]], dict[int, tuple[int, ...]]]
) -> None:
    pair.start("job-1", *RESTARTS)
    pair.wait_for_step(10)
    os.kill(rank_pids(pair.nodes[1].pid)[1], signal.SIGKILL)
    killed = time.time()
    wait_until(lambda: pair.loaded("job-1.1") is not None, 60, "training goes on")
    print(f"loaded again {(pair.loaded('job-1.1') or 0) - killed:.1f} s after the kill")
    pair.wait_for_step(25)
    os.kill(rank_pids(pair.nodes[1].pid)[0], signal.SIGSTOP)
    stopped = time.time()
    codes, said = pair.end(timeout=120)
    assert codes == [0, 0], said
    check_same(pair, undisturbed)

    assert pair.starts() == ["job-1", "job-1.1", "job-1.2"]
    assert "rank 3 on n1 (node 1) has ended (died by SIGKILL, 137): ending the others" in said[0]
    died, stuck = pair.event("died"), pair.event("stuck")
    assert (died["rank"], died["node"], died["code"]) == (3, "n1", 137)
    assert "rank 2 on n1 (node 1) is stuck in" in said[0]
    assert (stuck["rank"], stuck["node"]) == (2, "n1") and stuck["time"] - stopped < 30
    assert "in fit" in stuck["stack"] and "loop.py" in stuck["stack"]
    prefixes = {line.partition("] ")[0] for line in said[1].splitlines()}
    assert prefixes <= {"[n1:2", "[n1:3", "[n1"}


@pytest.mark.slow
def test_a_lost_node_and_a_signal_end_all_nodes_and_the_next_start_goes_on(
    pair: Pair, undisturbed: tuple[list[dict[str, Any]], dict[int, tuple[int, ...]]]
) -> None:
    for count, lost in enumerate((1, 0)):
        pair.start(f"job-1-{count}", *RESTARTS)
        pair.wait_for_step(10 * count + 10)
        os.kill(pair.nodes[lost].pid, signal.SIGKILL)
        codes, said = pair.end()
        assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 75, said
        assert f"node {lost}" in said[1 - lost] and "is lost" in said[1 - lost]
        wait_until(lambda: not processes_of(pair.job.folder), 20, "no process is left")
    pair.start("job-1-2", *RESTARTS)
    pair.wait_for_step(28)
    pair.nodes[1].send_signal(signal.SIGUSR2)
    codes, said = pair.end()
    assert codes == [85, 85], said
    saved = [event["step"] for event in pair.job.events() if event["kind"] == "save"]
    assert max(saved) == pair.job.lines()[-1]["step"]  # nothing is lost
    codes, said = pair.start("job-1-3", *RESTARTS).end()
    assert codes == [0, 0], said
    check_same(pair, undisturbed)
    codes, said = pair.start("job-1-4", *RESTARTS).end()
    assert codes == [0, 0] and "finished" in said[0], said  # and all nodes hear of it
