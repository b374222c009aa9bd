"""The whole product, crossed: saved by one engine on some ranks, resumed by another on others.

    python tools/matrix.py [--minutes 55] [--only NAME]

A run of 12 steps whose first six ran on {fsdp, ddp, zero2} x {1, 2, 3} ranks and whose last six ran on each of these
with another micro_batch, against one process that did all twelve: 81 ordered pairs of real runs. Single steps of every
engine and option are gradient_matrix.py's.

One line a finished crossing goes to build/matrix.jsonl; the same command goes on after the last of them. `--only NAME`
repeats those whose name contains NAME and writes nothing. docs/matrix.md is written at the end.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import judge
from results import ROOT, Line, Results, facts, provenance, sources, table, write_page
from small_jobs import ENGINES, SharedJobs, plan_rows

from tests.support.jobs import Job, processes_of, small_run

STEPS, SAVED_AT, BATCH = 12, 6, 8
RANKS = (1, 2, 3)  # 8 samples do not divide by 3: fillers
SAVED_WITH = {1: 4, 2: 2, 3: 1}  # micro_batch by ranks
GONE_ON_WITH = {1: 3, 2: 4, 3: 2}  # 3 does not divide 8: a short last micro-batch
EXACT = ("step", "position", "tokens", "lr")

# fp32 sums in another order: measured 1e-8 of a loss and 1e-7 of a norm over these 12 steps. Adam divides small
# moments by small roots and carries the rounding on (2e-7 of a loss, 5e-6 of a norm after 20 steps of a 0.7M model),
# hence the room. A wrong gradient, a lost moment or a wrong sample shows at 1e-3 and more.
RUN_TOLERANCE = {"loss": 5e-7, "grad_norm": 5e-6}


@dataclass(frozen=True)
class Side:
    """Who computes one half of a run."""

    engine: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.ranks}"

    def run_file(self, corpus: Path, micro_batch: int) -> dict[str, Any]:
        return small_run(
            corpus,
            engine={**ENGINES[self.engine], "precision": "fp32"},
            train={"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": micro_batch},
            eval={"corpora": []},
            checkpoint={"every_steps": None},
            cluster={"ranks_per_node": self.ranks},
        )


SIDES = [Side(engine, ranks) for engine, ranks in product(ENGINES, RANKS)]


class Runs:
    """The 81 crossings of whole runs. The nine saved states and the reference are made once."""

    def __init__(self, shared: SharedJobs) -> None:
        self.shared = shared
        alone = Side("ddp", 1).run_file(shared.corpus, BATCH)
        self.alone = shared.finished("alone", alone)
        self.lines = self.alone.lines()
        self.planned = plan_rows(self.alone, STEPS)

    def cross(self, first: Side, second: Side) -> Line:
        """Go on from a copy of what `first` saved."""
        saved = self.shared.finished(
            f"saved-{first.name}",
            first.run_file(self.shared.corpus, SAVED_WITH[first.ranks]),
            f"train.stop_at={SAVED_AT}",
        )
        job, begun = Job(self.shared.folder / f"{first.name}-to-{second.name}"), time.monotonic()
        shutil.rmtree(job.folder, ignore_errors=True)
        shutil.copytree(saved.run_dir, job.run_dir)
        job.write(second.run_file(self.shared.corpus, GONE_ON_WITH[second.ranks]))
        done = job.train(timeout=300)
        if done.returncode != 0:
            problems = [f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"]
            errors = dict.fromkeys(RUN_TOLERANCE, float("inf"))
        else:
            errors = {key: judge.worst(job.lines(), self.lines, key) for key in RUN_TOLERANCE}
            problems = [*self.problems(job), *too_large(errors, RUN_TOLERANCE)]
        if left := processes_of(job.folder):
            problems.append(f"processes {left} were left")
        if not problems:
            shutil.rmtree(job.folder)
        return line_of(errors, problems, time.monotonic() - begun)

    def problems(self, job: Job) -> Iterator[str]:
        """What must be exact and is not."""
        events = sorted(job.events(), key=lambda event: event["time"])
        origins = [event["from_step"] for event in events if event["kind"] == "attempt"]
        if origins != [0, SAVED_AT]:
            yield f"attempts began at {origins}, not at 0 and {SAVED_AT}"
        lines = job.lines()
        yield from judge.step_problems(lines, STEPS)
        yield from judge.bitwise_problems(lines, self.lines, EXACT, name="metrics.jsonl")
        paths = sorted((job.run_dir / "trace").glob("rank-*.jsonl"))
        traced, twice = judge.trace_of(line for p in paths for line in job.lines(f"trace/{p.name}"))
        yield from twice
        yield from judge.trace_problems(
            traced, self.planned, batch=BATCH, crc_of=judge.crc_in_shard
        )


def too_large(errors: dict[str, float], tolerance: dict[str, float]) -> list[str]:
    return [
        f"{key} is off by {error:.1e}, more than {tolerance[key]:.0e}"
        for key, error in errors.items()
        if not error <= tolerance[key]
    ]


def line_of(errors: dict[str, float], problems: Sequence[str], seconds: float) -> Line:
    return {
        "errors": errors,
        "seconds": round(seconds, 1),
        "verdict": "failed" if problems else "passed",
        "problems": list(problems),
    }


def run_work(shared: SharedJobs) -> Iterator[tuple[str, Callable[[], Line]]]:
    """Name of each crossing, and what to call for it. Saved states come one after another."""
    made: list[Runs] = []

    def cross(first: Side, second: Side) -> Line:
        if not made:
            made.append(Runs(shared))
        return made[0].cross(first, second)

    for first, second in product(SIDES, SIDES):
        yield f"runs/{first.name}/{second.name}", lambda f=first, s=second: cross(f, s)  # type: ignore[misc]


def page(lines: Sequence[Line]) -> Iterator[str]:
    """docs/matrix.md."""
    found = {line["name"]: line for line in lines}  # of a repeated one the last
    passed = sum(line["verdict"] == "passed" for line in found.values())
    yield "# Matrix: engines and ranks crossed"
    yield "Written by `make matrix`; do not edit."
    yield f"**{passed} of {len(found)} crossings passed** (the whole matrix has 81)."
    yield facts(provenance())
    yield "## Whole runs: saved by the left, resumed by the top"
    yield (
        f"{STEPS} steps in fp32; the first {SAVED_AT} on the left engine and ranks, the others on the top's with "
        "another micro_batch, against one process that did all. A cell: largest relative difference of any step's "
        f"loss / of any grad_norm. Tolerances {RUN_TOLERANCE['loss']:.0e} and {RUN_TOLERANCE['grad_norm']:.0e}: fp32 "
        "sums in another order, which Adam carries on. Positions, learning rates and the trace (positions, samples, "
        "CRC of the bytes, equal to `lmscale plan --data`) are exact."
    )
    yield table(
        ["saved by", *(side.name for side in SIDES)],
        (
            [first.name, *(run_cell(found.get(f"runs/{first.name}/{s.name}")) for s in SIDES)]
            for first in SIDES
        ),
    )
    yield "\n".join(
        f"- **failed** {line['name']}: {'; '.join(line['problems'])}"
        for line in found.values()
        if line["verdict"] == "failed"
    )


def run_cell(line: Line | None) -> str:
    if line is None:
        return ""
    errors = " / ".join(f"{line['errors'][key]:.0e}" for key in RUN_TOLERANCE)
    return errors if line["verdict"] == "passed" else f"**failed** {errors}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=55.0, help="no new crossing after these")
    parser.add_argument("--limit", type=int, help="most new crossings")
    parser.add_argument("--only", help="repeat those whose name contains this; write nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "matrix.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "matrix.md")
    return parser.parse_args()


def main() -> int:
    args, begun = arguments(), time.monotonic()
    results = Results(args.results.absolute(), sources=sources())
    shared = SharedJobs(results.path.with_suffix("") / sources())
    failed, done = 0, set() if args.only else {line["name"] for line in results.lines}
    left = [(name, work) for name, work in run_work(shared) if (args.only or "") in name]
    for name, work in [one for one in left if one[0] not in done][: args.limit]:
        if time.monotonic() - begun > args.minutes * 60:
            break
        found = work()
        shown = ", ".join(f"{key} {error:.1e}" for key, error in found["errors"].items())
        print(f"{name}: {found['verdict']} in {found['seconds']} s: {shown}", flush=True)
        print(*(f"    {problem}\n" for problem in found["problems"]), sep="", end="", flush=True)
        failed += found["verdict"] != "passed"
        if not args.only:
            results.append(name=name, **found)
    if args.only:
        return int(failed > 0)
    write_page(args.page, page(results.lines))
    verdicts = {line["name"]: line["verdict"] for line in results.lines}
    print(f"{sum(v == 'passed' for v in verdicts.values())} of {len(verdicts)} passed")
    return int("failed" in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
