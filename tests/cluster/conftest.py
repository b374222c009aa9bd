"""One real Slurm cluster for all tests of this folder, and a user on its login node."""

import json
import os
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmscale.config.yaml import render
from tests.support.jobs import Job, clean_env, finished_process, prepare_corpus, small_run
from tests.support.testbed import Testbed, wait_for, why_not

LMSCALE = Path(os.sys.executable).with_name("lmscale")
# Slow enough (about 50 ms a step on two idle cores) that Slurm, which takes seconds, can be followed by step.
MODEL = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 512}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.cluster)


@dataclass
class User(Job):
    """Somebody on the login node: a run file in a folder of the shared disk, and `lmscale`."""

    bed: Testbed | None = None

    def do(self, *argv: str | Path, timeout: float = 60) -> "subprocess.CompletedProcess[str]":
        """`lmscale ...` to its end, whatever that is."""
        assert self.bed is not None
        env = clean_env(SLURM_CONF=str(self.bed.conf))
        return finished_process([LMSCALE, *argv], cwd=self.folder, env=env, timeout=timeout)

    def must(self, *argv: str | Path, timeout: float = 60) -> str:
        """`lmscale ...` that has to succeed; its standard output."""
        done = self.do(*argv, timeout=timeout)
        assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *overrides: str) -> str:
        """Submit the run file to the cluster; the job's id."""
        out = self.must("submit", f"{self.name}.yaml", "--cluster", "testbed", *overrides, "--json")
        return str(json.loads(out)["job"])

    def status(self) -> dict[str, Any]:
        """What `lmscale status RUN --json` says."""
        found: dict[str, Any] = json.loads(self.must("status", self.run_dir, "--json"))
        return found

    def step(self) -> int:
        """The last step that metrics.jsonl has."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else 0

    def log(self) -> str:
        """The merged logs of all submissions."""
        found = sorted((self.run_dir / "logs").glob("job-*.log"))
        return "\n".join(path.read_text(errors="replace") for path in found)

    def all_logs(self) -> str:
        """What every rank of every start has said."""
        found = sorted((self.run_dir / "logs").glob("*.log"))
        return "\n".join(path.read_text(errors="replace") for path in found)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of this kind, of all starts, by time."""
        found = [
            event
            for path in (self.run_dir / "events").glob("*.jsonl")
            for event in self.lines(f"events/{path.name}")
            if event["kind"] == kind
        ]
        return sorted(found, key=lambda event: event["time"])

    def starts(self) -> list[dict[str, Any]]:
        """The starts, one each, by time."""
        found: dict[str, dict[str, Any]] = {}
        for event in self.events("start"):
            found.setdefault(event["start"], event)
        return list(found.values())

    def wait_step(self, step: int, timeout_s: float = 150) -> None:
        """Until metrics.jsonl has this step."""
        wait_for(lambda: self.step() >= step, timeout_s, f"step {step}; log:\n{self.tail()}")

    def wait_start(self, number: int, timeout_s: float = 150) -> dict[str, Any]:
        """Until the run was started so many times, and trains; the last start."""
        wait_for(lambda: len(self.starts()) >= number, timeout_s, f"start {number}")
        start = self.starts()[-1]["start"]
        wait_for(
            lambda: any(event["start"] == start for event in self.events("attempt")),
            timeout_s,
            f"an attempt of {start}",
        )
        return self.starts()[-1]

    def wait_state(self, *states: str, timeout_s: float = 120) -> dict[str, Any]:
        """Until `lmscale status` says one of these; what it says."""
        deadline, said = time.monotonic() + timeout_s, self.status()
        while said["state"] not in states:
            assert time.monotonic() < deadline, f"not {states}: {said}\n{self.tail()}"
            time.sleep(1)
            said = self.status()
        return said

    def tail(self, lines: int = 40) -> str:
        """The end of the merged log, for a failure's message."""
        return "\n".join(self.log().splitlines()[-lines:])

    def hosts(self) -> list[str]:
        """Where the job runs now, node 0 first."""
        assert self.bed is not None
        jobs = self.bed.run("squeue", "-h", "-t", "R", "-n", self.name, "-o", "%N").split()
        return self.bed.run("scontrol", "show", "hostnames", jobs[0]).split() if jobs else []


def losses_agree(found: list[dict[str, Any]], wanted: list[dict[str, Any]], within: float) -> None:
    """One line a step, from 1, and the same losses as in a run that nobody disturbed."""
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    worst = max(
        abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(found, wanted, strict=True)
    )
    assert worst <= within, f"losses differ by {worst}"


@pytest.fixture(scope="session")
def shared_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all nodes see."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def corpus(shared_disk: Path) -> Path:
    """A small prepared collection."""
    return prepare_corpus(shared_disk)


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """The cluster: four nodes, up for the whole session."""
    if reason := why_not():
        warnings.warn(f"NO CLUSTER TESTS: {reason}", stacklevel=1)
        pytest.skip(reason)
    found = Testbed(Path("/tmp") / f"lmscale-testbed-{os.getpid()}", tag="lmt", net="10.77.1")
    found.start()
    yield found
    found.stop()


@pytest.fixture
def whole(bed: Testbed) -> Iterator[Testbed]:
    """The cluster with all nodes up and no job in it, before and after the test."""
    yield bed
    bed.run("scancel", "--user=root", "--full")
    bed.mend()


def small_cluster_run(corpus: Path, steps: int, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run file whose steps take long enough to be followed from outside."""
    named = {"train": {"steps": steps, "seq_len": 64}, "eval": {"every_steps": None}}
    named["checkpoint"] = {"every_steps": 20}
    # Other ranks sum in another order, and training amplifies that: at a learning rate of 3e-3 from 1e-16 to 1e-3 in
    # 400 steps, beyond telling it from a fault. Hence fp64 and a small learning rate.
    named["engine"] = {"precision": "fp64"}
    named["optim"] = {"lr": 2e-4}
    for name, section in sections.items():
        named[name] = {**named.get(name, {}), **section}
    return small_run(corpus, model=MODEL, **named)


STEPS = 300
_CLUSTER = {
    "kind": "slurm",
    "nodes": 2,
    "ranks_per_node": 2,
    "time_limit": "30m",
    "max_restarts": 4,
    "env": {"OMP_NUM_THREADS": "1"},
    "slurm": {"cpus_per_task": 2, "signal_lead": "60s"},
}


@pytest.fixture
def user(whole: Testbed, shared_disk: Path, corpus: Path, request: pytest.FixtureRequest) -> User:
    """A user with a run file and the site's cluster file; the run is named after the test."""
    name = re.sub(r"\W+", "-", request.node.originalname)[:40]
    folder = Path(tempfile.mkdtemp(dir=shared_disk, prefix="user-"))
    (folder / "testbed.yaml").write_text(render(_CLUSTER))
    found = User(folder, name, bed=whole)
    found.write(small_cluster_run(corpus, STEPS))
    return found


@pytest.fixture(scope="session")
def undisturbed(shared_disk: Path, corpus: Path) -> Job:
    """The same run on this host, with two ranks and nobody who disturbs it."""
    job = Job(shared_disk, "undisturbed")
    job.write(small_cluster_run(corpus, STEPS))
    done = job.train("--nproc", "2", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return job
