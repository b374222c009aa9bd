"""Random SIGKILLs, and after each the same command again: nothing may be lost, repeated, different or left over.

    python tools/soak.py [--trials 60] [--minutes 55] [--seed S] [--only N]

One line a finished trial goes to build/soak.jsonl; the same command goes on after the last of them, with its
seed. `--only N` repeats one trial and writes nothing. docs/soak.md is written at the end. kills.py says what a
trial does, judge.py what must hold afterwards. A failed trial leaves its folder under build/soak/.
"""

import argparse
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import judge
from kills import IN_PLACE, MOMENTS, VICTIMS, Trial, in_words, plan_trial
from results import ROOT, Line, Results, facts, provenance, sources, table, write_page
from small_jobs import ENGINES, SharedJobs, plan_rows
from strike import Struck, Usual, abandoned, kill_all, shared_memory

from tests.support.jobs import Job, lmscale, small_run

STEPS = 60
BATCH = 8  # small_run's global_batch
SAME = ("step", "loss", "grad_norm", "position", "tokens", "lr")
SAME_EVAL = ("step", "corpus", "metric", "value", "count")


class Reference:
    """An engine's undisturbed run, with which every trial is compared. Made once, kept in build/soak."""

    def __init__(self, shared: SharedJobs, engine: str) -> None:
        self.job = shared.finished(f"reference-{engine}", run_file(shared.corpus, engine))
        self.lines, self.evals = self.job.lines(), self.job.lines("eval.jsonl")
        self.planned = plan_rows(self.job, STEPS)
        times = [event["time"] for event in self.job.events() if event["kind"] == "start"]
        others = [event["time"] for event in self.job.events() if event["kind"] != "start"]
        saved = [event["time"] for event in self.job.events() if event["kind"] == "sample"]
        self.usual = Usual(STEPS, min(others) - min(times), max(others) - min(saved))
        assert len(self.lines) == STEPS, f"{self.job.run_dir}: the reference has gaps itself"


def run_file(corpus: Path, engine: str, *, max_restarts: int = 0) -> dict[str, Any]:
    return small_run(
        corpus,
        engine={**ENGINES[engine], "precision": "fp32"},
        train={"steps": STEPS},
        model={"dropout": 0.1},
        checkpoint={"every_steps": 7},
        cluster={"max_restarts": max_restarts, "ranks_per_node": 2},
    )


def verdict(job: Job, reference: Reference) -> Iterator[str]:
    """What is wrong with a finished run folder; nothing: it is the uninterrupted one."""
    lines = job.lines()
    yield from judge.step_problems(lines, STEPS)
    yield from judge.bitwise_problems(lines, reference.lines, SAME, name="metrics.jsonl")
    evals = job.lines("eval.jsonl")
    yield from judge.bitwise_problems(evals, reference.evals, SAME_EVAL, name="eval.jsonl")
    paths = sorted((job.run_dir / "trace").glob("rank-*.jsonl"))
    traced, twice = judge.trace_of(line for p in paths for line in job.lines(f"trace/{p.name}"))
    yield from twice
    yield from judge.trace_problems(
        traced, reference.planned, batch=BATCH, crc_of=judge.crc_in_shard
    )
    if left := [name for name in job.checkpoints() if name.endswith(".tmp")]:
        yield f"checkpoints: unfinished ones were left: {left}"
    done = lmscale("verify", job.run_dir, cwd=job.folder)
    if done.returncode != 0:
        yield f"lmscale verify: {done.stdout}{done.stderr}"


def run_trial(trial: Trial, reference: Reference, folder: Path) -> Line:
    """Everything a result line says about a trial. The folder goes where it passed."""
    kill_all(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job, memory, begun = Job(folder), shared_memory(), time.monotonic()
    max_restarts = len(trial.kills) if trial.victim == IN_PLACE else 0
    job.write(
        run_file(reference.job.folder.parent / "small", trial.engine, max_restarts=max_restarts)
    )
    struck = Struck(job, trial, reference.usual)
    try:
        struck.run()
    finally:
        kill_all(folder)
    if left := abandoned(shared_memory() - memory):
        struck.problems.append(f"/dev/shm: {sorted(left)} were left")
    problems = [*struck.problems, *verdict(job, reference)]
    if not problems:
        shutil.rmtree(folder)
    return {
        "trial": trial.number,
        "engine": trial.engine,
        "kind": trial.victim,
        "moments": struck.moments,
        "step": struck.steps,
        "torn": struck.torn,
        "restarts": len(struck.moments),
        "recovery_s": struck.recovery_s and round(struck.recovery_s, 2),
        "seconds": round(time.monotonic() - begun, 1),
        "verdict": "passed" if not problems else "failed",
        "problems": problems,
    }


def page(lines: Sequence[Line], seed: int) -> Iterator[str]:
    """docs/soak.md."""
    passed = sum(line["verdict"] == "passed" for line in lines)
    kills = sum(line["restarts"] for line in lines)
    yield "# Soak: random kills"
    yield (
        "Written by `make soak`; do not edit. Each trial starts a run of 60 steps on two ranks (fp32, dropout, "
        "`train.deterministic`), SIGKILLs it one to three times in a row, and starts the same command again. Passed: "
        "one line a step; loss, grad_norm, lr and position of every step, and all of eval.jsonl, bitwise those of an "
        "undisturbed run; the trace equal to `lmscale plan --data --json`, down to the CRC of the bytes; the "
        "expected exit codes; every checkpoint sound; no process, no .tmp folder and nothing in /dev/shm left over."
    )
    yield f"**{passed} of {len(lines)} trials passed, with {kills} kills.**"
    yield facts({**provenance(), "seed": seed})
    rows = []
    for engine in ENGINES:
        for victim in VICTIMS:
            own = [one for one in lines if (one["engine"], one["kind"]) == (engine, victim)]
            times = [one["recovery_s"] for one in own if one["recovery_s"] is not None]
            median = f"{statistics.median(times):.1f}" if times else "-"
            good = sum(one["verdict"] == "passed" for one in own)
            rows.append((engine, victim, len(own), good, sum(o["restarts"] for o in own), median))
    header = ("engine", "killed", "trials", "passed", "kills", "median recovery s")
    yield table(header, rows)
    yield (
        "Recovery: from the last start (in place: from the kill) until the run is one step beyond where it was "
        "killed, so it holds the imports, the load and the steps that are done again."
    )
    hits = [
        (line, moment, torn)
        for line in lines
        for moment, torn in zip(line["moments"], line["torn"], strict=True)
    ]
    yield table(
        ("moment", "kills", "that left an unfinished checkpoint", "in trials that failed"),
        [
            (
                moment,
                sum(found == moment for _, found, _ in hits),
                sum(found == moment and torn for _, found, torn in hits),
                sum(found == moment and line["verdict"] == "failed" for line, found, _ in hits),
            )
            for moment in MOMENTS
        ],
    )
    failed = [line for line in lines if line["verdict"] == "failed"]
    if failed:
        yield "\n".join(f"- trial {one['trial']}: {'; '.join(one['problems'])}" for one in failed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--trials", type=int, default=60, help="in all, with those of earlier calls"
    )
    parser.add_argument("--minutes", type=float, default=55.0, help="no new trial after these")
    parser.add_argument("--seed", type=int, help="default: the last line's, else drawn")
    parser.add_argument("--only", type=int, help="repeat this trial; write nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "soak.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "soak.md")
    return parser.parse_args()


def main() -> int:
    args, begun = arguments(), time.monotonic()
    results = Results(args.results.absolute(), sources=sources())
    seed = args.seed
    if seed is None:
        seeds = [line["seed"] for line in results.lines]
        seed = seeds[-1] if seeds else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    shared = SharedJobs(results.path.with_suffix("") / sources())
    references: dict[str, Reference] = {}

    def run(number: int) -> Line:
        trial = plan_trial(seed, number)
        if trial.engine not in references:
            references[trial.engine] = Reference(shared, trial.engine)
        print(f"trial {number}: {in_words(trial)}", flush=True)
        found = run_trial(trial, references[trial.engine], shared.folder / f"trial-{number:05d}")
        print(
            f"    {found['verdict']} in {found['seconds']} s, killed at {found['step']}, "
            f"recovered in {found['recovery_s']} s",
            *found["problems"], sep="\n    ", flush=True,
        )  # fmt: skip
        return found

    if args.only is not None:
        return int(run(args.only)["verdict"] != "passed")
    done = {line["trial"] for line in results.lines if line["seed"] == seed}
    for number in range(args.trials):
        if time.monotonic() - begun > args.minutes * 60:
            break
        if number not in done:
            results.append(seed=seed, **run(number))
    own = [line for line in results.lines if line["seed"] == seed]
    write_page(args.page, page(own, seed))
    print(table(("trials", "passed"), [(len(own), sum(o["verdict"] == "passed" for o in own))]))
    return int(any(line["verdict"] != "passed" for line in own))


if __name__ == "__main__":
    sys.exit(main())
