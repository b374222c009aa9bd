"""CPU seconds of `lmscale --help` and of a config error, alone or against another checkout, paired and interleaved.

    python tools/bench_startup.py [--rounds 15] [--against CHECKOUT] [--json FILE]

Each round runs every command once per checkout, in a random order. CPU time is user and system time of the process and
its children. The ratio is the median over rounds of this checkout's time over the other's. `null` runs the command of
this checkout once more: the distance of its ratio from 1 is the noise.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = "model: llama-1b\noptim: {lrr: 1e-3}\n"


def cpu_seconds(checkout: Path, arguments: list[str], cwd: Path) -> float:
    """User and system seconds of one run of the command line of a checkout."""
    # Before lmscale.cli existed, the command line was launcher.cli.
    module = "lmscale" if list((checkout / "lmscale").glob("cli*")) else "launcher.cli"
    path = f"{checkout}:{checkout / 'launcher'}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, check=False,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--against", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    checkouts = {"this": ROOT, "null": ROOT}
    if args.against is not None:
        checkouts["other"] = args.against.resolve()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.yaml").write_text(RUN)
        commands = {"--help": ["--help"], "config error": ["train", "run.yaml"]}
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(args.rounds + 1):  # the first round fills caches and is dropped
            jobs = [(name, command) for name in checkouts for command in commands]
            random.shuffle(jobs)
            for name, command in jobs:
                spent = cpu_seconds(checkouts[name], commands[command], Path(folder))
                seconds.setdefault((name, command), []).append(spent)
    rows = []
    for command in commands:
        own = seconds["this", command][1:]
        row: dict[str, object] = {"command": command, "cpu_s": statistics.median(own)}
        for name in list(checkouts)[1:]:
            other = seconds[name, command][1:]
            row[f"ratio_{name}"] = statistics.median(a / b for a, b in zip(own, other, strict=True))
        rows.append(row)
        print(
            "  ".join(
                f"{key}={value:.3f}" if isinstance(value, float) else f"{value}"
                for key, value in row.items()
            )
        )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
