"""What every contender does, and how it is told to: read by programs in different environments, so torch only."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Task:
    """One training job. Weights stand in `file` under lmscale's names, tokens [steps, rows, length + 1] beside them."""

    file: str
    layers: int = 6
    width: int = 384
    heads: int = 6
    feed_forward: int = 1024
    vocab: int = 8192
    rows: int = 8
    length: int = 256
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    precision: str = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        found = json.loads(text)
        return cls(**{**found, "betas": tuple(found["betas"])})

    def weights(self) -> dict[str, Any]:
        """Initial weights, fp32."""
        from safetensors.torch import load_file

        return {name: value for name, value in load_file(self.file).items() if name != "tokens"}

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """(tokens, targets), [rows, length] each, for ever."""
        from safetensors.torch import load_file

        rows = load_file(self.file)["tokens"]
        return cycle([(step[:, :-1].contiguous(), step[:, 1:].contiguous()) for step in rows])

    def groups(self, named: Any) -> list[dict[str, Any]]:
        """AdamW's groups: matrices decay, norms do not."""
        named = list(named)
        return [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]


class Stopped(BaseException):
    """The driver has closed the pipe. A BaseException: a trainer in between shall not handle it."""


class Pace:
    """Lets a trainer do as many steps as the driver asks for, and blocks it in between.

    The trainer keeps its own loop: it calls `wait` before its first step and `done` at the end of each, so
    whatever it does from one to the next is in the time of a step.
    """

    def __init__(self) -> None:
        self._commands = sys.stdin
        # Libraries print: the driver's pipe is moved away from them.
        self._answers: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left = 0
        self._found: dict[str, Any] = {}

    def wait(self, **first: Any) -> None:
        """Say that all is set up, then block until steps are asked for."""
        self._answer({"ready": True, **first})
        self._read()

    def done(self, loss: Any = None, norm: Any = None) -> None:
        """A step has ended; scalars of any kind."""
        self._found["seconds"].append(time.perf_counter() - self._begun)
        self._found["cpu_seconds"].append(time.process_time() - self._begun_cpu)
        self._found["losses"].append(None if loss is None else float(loss))
        self._found["norms"].append(None if norm is None else float(norm))
        self._left -= 1
        if self._left == 0:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            self._found["faults"] = (usage.ru_minflt - self._faults) / len(self._found["seconds"])
            self._found["peak_rss_bytes"] = usage.ru_maxrss * 1024
            self._answer(self._found)
            self._read()
        self._begin()

    def _read(self) -> None:
        line = self._commands.readline()
        if not line:
            raise Stopped
        self._left = json.loads(line)["steps"]
        self._found = {"seconds": [], "cpu_seconds": [], "losses": [], "norms": []}
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self._begin()

    def _begin(self) -> None:
        self._begun, self._begun_cpu = time.perf_counter(), time.process_time()

    def _answer(self, found: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(found) + "\n")
        self._answers.flush()


def main() -> None:
    """`python task.py PROGRAM` with the task as first line of standard input: run PROGRAM.run(task, pace)."""
    import ctypes
    import importlib
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: none outlives the driver
    sys.path.insert(0, str(Path(__file__).parent))
    import task as this  # not __main__: the programs must meet the same classes
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job, pace = this.Task.from_json(sys.stdin.readline()), this.Pace()
    program = importlib.import_module(sys.argv[1])
    try:
        program.run(job, pace)
    except this.Stopped:
        os._exit(0)  # a trainer's own farewell (saving, closing groups) is nobody's business here


if __name__ == "__main__":
    main()
