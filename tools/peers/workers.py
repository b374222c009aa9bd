"""One resident process a contender; the driver lets one at a time do some steps, and all others sleep."""

import json
import mmap
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from contenders import Contender
from task import Task
from venvs import python_of

HERE = Path(__file__).resolve().parent
_LEAST_FREE = 3 << 29  # bytes: a worker of the full size needs about a gigabyte


class Worker:
    """A contender's process, from its start until `close`."""

    def __init__(
        self, contender: Contender, task: Task, *, env: Mapping[str, str], logs: Path
    ) -> None:
        self.contender = contender
        self.seconds: list[float] = []  # of the measured steps
        self.cpu_seconds: list[float] = []
        self.faults: list[float] = []
        self.first: dict[str, list[Any]] = {}  # losses and norms of the first steps
        self._log = logs / f"{contender.name}.log"
        self._begun = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python_of(contender.venv), "-u", HERE / "task.py", contender.program],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **env}, cwd=logs,
            )  # fmt: skip
        task = replace(task, precision=contender.precision, options=contender.options)
        self._tell(task.to_json())
        self._hear()

    def warm_up(self, steps: int) -> None:
        """The first steps: compiling, growing, and the losses that show that all do the same work."""
        self._ask(1)
        self.start_s = time.perf_counter() - self._begun
        losses, norms = [self._found["losses"][0]], [self._found["norms"][0]]
        if steps > 1:
            self._ask(steps - 1)
            losses, norms = losses + self._found["losses"], norms + self._found["norms"]
        self.first = {"losses": losses, "norms": norms}

    def take_turn(self, *, settle: int, steps: int) -> None:
        """`settle` steps that fill the caches again, then the measured ones; their mean is this round's time."""
        self._ask(settle + steps)
        self.all_cpu_seconds = sum(self._found["cpu_seconds"])
        self.seconds.append(sum(self._found["seconds"][settle:]) / steps)
        self.cpu_seconds.append(sum(self._found["cpu_seconds"][settle:]) / steps)
        self.faults.append(self._found["faults"])
        self.peak_rss_bytes = self._found["peak_rss_bytes"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, steps: int) -> None:
        self._tell(json.dumps({"steps": steps}))
        self._found = self._hear()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace")[-3000:]
            raise SystemExit(f"{self.contender.name} ended; {self._log}:\n{tail}")
        found: dict[str, Any] = json.loads(line)
        return found


def require_memory(name: str) -> None:
    """Better to end here than to measure a machine that drops its file cache."""
    free = available_bytes()
    if free < _LEAST_FREE:
        raise SystemExit(f"{name}: only {free >> 20} MiB are left; name fewer with --contenders")


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise AssertionError("/proc/meminfo has no MemAvailable")


def touch_memory(share: float) -> None:
    """Write to that share of the free memory: a virtual machine gets it from its host at the first touch, slowly."""
    size = int(available_bytes() * share) // mmap.PAGESIZE * mmap.PAGESIZE
    if size:
        with mmap.mmap(-1, size) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1


def busy_s() -> float:
    """Seconds that all programs of this machine have computed, over all cores."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, soft, steal = map(int, first[:8])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
