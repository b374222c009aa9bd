"""A small corpus and a small run, and a job: what a user starts, seen from outside."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscale.config.yaml import render

LMSCALE = Path(sys.executable).with_name("lmscale")

# fmt: off
WORDS = (  # noqa: SIM905
    "the quick brown fox jumps over a lazy dog while seven wizards brew potent coffee "
    "and nobody counts how often a model reads this line again before it knows it"
).split()
# fmt: on


def clean_env(**more: str) -> dict[str, str]:
    """The environment of a user's shell: no rank variables of whoever runs the tests."""
    ranks = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "LMSCALE_",
        "OMP_",
        "SLURM_",
        "PMIX_",
        "OMPI_",
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ranks)}
    # Small matrices on several threads spend their time in barriers, minutes of it on a busy machine.
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def lmscale(
    *argv: str | Path, cwd: Path, timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the console script to its end."""
    return finished_process([LMSCALE, *argv], cwd=cwd, env=clean_env(**env), timeout=timeout)


def finished_process(
    argv: list[str | Path], *, cwd: Path, env: dict[str, str], timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run any command to its end."""
    return subprocess.run(
        [str(word) for word in argv], cwd=cwd, env=env, timeout=timeout,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def write_texts(folder: Path, *, documents: int = 120, seed: int = 0) -> Path:
    """Text with something to learn: words in a loose order."""
    chooser = random.Random(seed)
    path = folder / f"texts-{documents}-{seed}.jsonl"
    with path.open("w") as file:
        for _ in range(documents):
            begin = chooser.randrange(len(WORDS))
            words = [
                WORDS[(begin + i * chooser.choice((1, 1, 1, 2))) % len(WORDS)] for i in range(60)
            ]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def prepare_corpus(folder: Path) -> Path:
    """A collection of about 40,000 byte tokens, in several shards, with a held-out part."""
    source = write_texts(folder)
    done = lmscale(
        "prepare", folder / "small", source, "--tokenizer", "bytes", "--chunk-tokens", "1024",
        "--shard-chunks", "8", "--heldout", "5%", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "small"


def small_run(corpus: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run file of a model that takes milliseconds a step."""
    run: dict[str, Any] = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "ffn_hidden_size": 64},
        "data": {"corpora": [{"path": str(corpus)}], "trace": True},
        "engine": {"kind": "fsdp"},
        "optim": {"lr": 3e-3, "warmup_steps": "5%"},
        "train": {
            "steps": 40, "global_batch_size": 8, "micro_batch_size": 2, "seq_len": 32, "deterministic": True,
        },
        "eval": {"corpora": [str(corpus)], "every_steps": 20},
        "checkpoint": {"every_steps": 7},
    }  # fmt: skip
    for name, section in sections.items():
        run[name] = {**run.get(name, {}), **section}
    return run


@dataclass
class Job:
    """A run file in a folder of its own, and what its starts left there."""

    folder: Path
    name: str = "run"

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.name

    def write(self, run: dict[str, Any]) -> None:
        (self.folder / f"{self.name}.yaml").write_text(render(run))

    def train(
        self, *overrides: str, timeout: float = 120, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """`lmscale train` to its end."""
        return lmscale(
            "train", f"{self.name}.yaml", *overrides, cwd=self.folder, timeout=timeout, **env
        )

    def start(self, *overrides: str, **env: str) -> "subprocess.Popen[str]":
        """`lmscale train` in the background, in a process group of its own as from a shell."""
        return subprocess.Popen(
            [str(LMSCALE), "train", f"{self.name}.yaml", *overrides], cwd=self.folder,
            env=clean_env(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def lines(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The whole lines of a file in the run folder."""
        try:
            text = (self.run_dir / name).read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def trace(self) -> dict[int, tuple[int, ...]]:
        """position -> (corpus, epoch, sample, crc32c) over all ranks; no position may stand twice."""
        found: dict[int, tuple[int, ...]] = {}
        for path in sorted((self.run_dir / "trace").glob("rank-*.jsonl")):
            for line in self.lines(f"trace/{path.name}"):
                assert line["position"] not in found, (
                    f"position {line['position']} was trained on twice"
                )
                found[line["position"]] = tuple(
                    line[k] for k in ("corpus", "epoch", "sample", "crc32c")
                )
        return found

    def events(self) -> list[dict[str, Any]]:
        return [
            line
            for path in sorted((self.run_dir / "events").glob("*.jsonl"))
            for line in self.lines(f"events/{path.name}")
        ]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").glob("step-*"))

    def wait_for_step(
        self, step: int, process: "subprocess.Popen[str]", timeout: float = 90
    ) -> None:
        """Until metrics.jsonl has the line of `step`."""
        deadline = time.monotonic() + timeout
        while len(self.lines()) < step:
            assert process.poll() is None, f"ended early: {process.communicate()[0]}"
            assert time.monotonic() < deadline, f"no step {step} after {timeout} s"
            time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, found by their parents in /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def rank_pids(pid: int) -> list[int]:
    """The ranks below a supervisor, by rank."""
    ranks = {}
    for below in descendants(pid):
        try:
            env = (Path("/proc") / str(below) / "environ").read_bytes().split(b"\0")
            argv = (Path("/proc") / str(below) / "cmdline").read_bytes()
        except OSError:
            continue
        for item in env:
            if item.startswith(b"RANK=") and b"lmscale" in argv:
                ranks.setdefault(int(item[5:]), below)
    return [ranks[rank] for rank in sorted(ranks)]


def processes_of(folder: Path) -> list[int]:
    """Processes that work in `folder` or were started with a path in it: leftovers of a job."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            there = os.readlink(entry / "cwd")
            argv = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if there.startswith(str(folder)) or str(folder) in argv:
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll until true."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout} s still not: {what}"
        time.sleep(0.02)
