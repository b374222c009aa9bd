"""Supervised jobs of stand-in ranks: plain scripts without torch, and real signals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmscale.run_folder.events import read_events
from lmscale.run_folder.paths import RunFolder
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]

# Runs supervise() as the launcher does: from the main thread of a process of its own.
DRIVER = """
import os, signal, sys, json
from pathlib import Path
import lmscale
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who started the tests may have had it ignored (nohup)
from lmscale_launcher.supervisor.rank_process import NodeTopology
from lmscale_launcher.supervisor.stall import StallLimits
from lmscale_launcher.supervisor.context import SupervisorJob
from lmscale_launcher.supervisor.supervisor import supervise
from lmscale.run_folder.paths import RunFolder
from lmscale.base.errors import LmscaleError
options = json.loads(sys.argv[1])
nodes = options.pop("nodes", {})
options["stall_limits"] = StallLimits(*options.pop("stall_limits", ()))
lmscale.__version__ = options.pop("version", lmscale.__version__)
job = SupervisorJob(
    command=[sys.executable, "-S", options.pop("script")], folder=RunFolder(Path(options.pop("folder"))),
    topology=NodeTopology(options.pop("ranks"), **nodes), env=os.environ,
    **{"start": "s", "by_hand": True, "max_restarts": 0, "grace_s": 1.0, "restart_delay_s": 0.01, **options},
)
try:
    sys.exit(supervise(job))
except LmscaleError as error:
    print(error, file=sys.stderr)
    sys.exit(int(error.exit_code))
"""

RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
rank, run = int(os.environ.get("RANK", 0)), Path({run!r})
def mark(name, text=""):
    path = run / "marks" / f"{{name}}-{{rank}}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(str(text))
def wait(seconds=60):
    time.sleep(seconds)
def event(kind, **fields):
    with open(run / "events" / (os.environ["LMSCALE_START"] + ".jsonl"), "a") as file:
        line = {{"time": time.time(), "kind": kind, "start": os.environ["LMSCALE_START"]}}
        file.write(json.dumps({{**line, "host": "h", "pid": os.getpid(), **fields}}) + "\\n")
"""


class Start:
    """One supervised job of stand-in ranks."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.run.mkdir(exist_ok=True)
        self.script = folder / "rank.py"

    def options(self, body: str, **options: Any) -> list[str]:
        text = RANK.format(run=str(self.run)) + textwrap.dedent(body)
        if not self.script.exists() or self.script.read_text() != text:
            self.script.write_text(text)
        given = {"script": str(self.script), "folder": str(self.run), "ranks": 2, **options}
        return [sys.executable, "-c", DRIVER, json.dumps(given)]

    def launch(
        self, body: str, env: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.options(body, **options), cwd=ROOT, env=clean_env(**(env or {})), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def to_the_end(self, body: str, **options: Any) -> tuple[int, str]:
        process = self.launch(body, **options)
        said, _ = process.communicate(timeout=20)
        return process.returncode, said

    def kinds(self) -> list[str]:
        """Kinds of all events, but for the deaths."""
        return [event["kind"] for event in self.events() if event["kind"] != "died"]

    def marks(self, name: str) -> dict[int, str]:
        found = (self.run / "marks").glob(f"{name}-*")
        return {int(p.name.rpartition("-")[2]): p.read_text() for p in sorted(found)}

    def events(self) -> list[dict[str, Any]]:
        return read_events(RunFolder(self.run))

    def wait_for(self, name: str, count: int) -> dict[int, str]:
        until(lambda: len([t for t in self.marks(name).values() if t]) == count, name)
        return self.marks(name)


class Nodes:
    """A job of several supervisors, one a node."""

    def __init__(self, folder: Start, body: str, *, count: int = 2, **options: Any) -> None:
        self.folder = folder
        self.master = f"127.0.0.1:{free_port()}"
        self.body = body
        self.count = count
        self.options = {
            "by_hand": False,
            "start": "job-1",
            "ranks": 2,
            "rendezvous_timeout_s": 20.0,
            **options,
        }
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def launch(self, *which: int, **options: Any) -> "Nodes":
        for node in which or range(self.count):
            topology = {"nodes": self.count, "node": node, "master": self.master}
            self.processes[node] = self.folder.launch(
                self.body, env={"SLURMD_NODENAME": f"n{node}"}, nodes=topology,
                **{**self.options, **options},
            )  # fmt: skip
        return self

    def end(self, timeout: float = 20) -> tuple[list[int], dict[int, str]]:
        """Exit codes and words, by node."""
        said = {n: one.communicate(timeout=timeout)[0] for n, one in self.processes.items()}
        return [one.returncode for _, one in sorted(self.processes.items())], said

    def pid(self, node: int) -> int:
        return self.processes[node].pid


def kind(start: Start, name: str) -> list[dict[str, Any]]:
    return [event for event in start.events() if event["kind"] == name]


def clean_env(**more: str) -> dict[str, str]:
    drop = (
        "RANK",
        "WORLD_SIZE",
        "LMSCALE_",
        "MASTER_",
        "LOCAL_",
        "OMP_",
        "SLURM_",
        "OMPI_",
        "PMIX",
    )
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)} | more


def until(condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.01)


def alive(pids: list[int]) -> list[int]:
    """Those that run: a zombie whose reaper is slow has ended."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def mentioning(folder: Path) -> list[int]:
    """Every process whose command line names the folder: ranks and what they started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return alive(found)


def watched(folder: Path) -> Iterator[Start]:
    """For a fixture: a start whose processes must all have ended when the test has."""
    yield Start(folder)
    deadline = time.monotonic() + 2  # after a SIGKILL the kernel and the guard need a moment
    while (left := mentioning(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes outlived their supervisor"
