"""Every combination of engines and options, three at a time, against one process.

    python tools/gradient_matrix.py [--minutes 60] [--only WORDS] [--json] [--mutations]

One line per finished case is written to docs/gradients.jsonl, which is committed; the same command resumes after the
last of them. A line counts only for the code that it was measured on (tests/gradients/provenance.py): a change there
starts the matrix again. When every case has its line, lmscale/config/proven.json is written, by which the config check
decides; docs/gradients.md is always written.

--only WORDS   run the cases that have all these words ("hsdp bf16"), or the one that they name; write nothing
--mutations    plant every bug of tests/gradients/mutations.py and print which case of the pairs catches it
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from results import ROOT, Line, Results, write_page

from tests.gradients.case import GradientCase, by_world
from tests.gradients.cover import triples
from tests.gradients.errors import verdict
from tests.gradients.mutations import BUGS, caught_by
from tests.gradients.page import page, write_proven
from tests.gradients.provenance import digest
from tests.gradients.run import on_ranks, one_process
from tests.support import rank_pool as pool
from tests.support.rank_pool import CaseFailed, Pool

CASE_DEADLINE_S = 400.0  # eight ranks that compile on two cores


class Proofs(Results):
    """Lines that stay valid when packages that compute no step change, so that a matrix can be resumed."""

    def append(self, **fields: object) -> Line:
        """Write one line; it is on the disk when this returns. Ends the program where the code has changed."""
        if digest() != self._sources:
            raise SystemExit(
                "the code changed during the case, so its result is dropped; start again"
            )
        line = {**fields, "sources": self._sources, "time": datetime.now(UTC).isoformat()[:19]}
        self._all = [*self.lines, line]
        whole = "".join(json.dumps(line) + "\n" for line in self._all)
        beside = self.path.with_suffix(".part")
        with beside.open("w", encoding="utf-8") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        return line


class Pools:
    """One pool of ranks at a time: those of the world at work."""

    def __init__(self) -> None:
        self._pool: Pool | None = None
        pool.START_DEADLINE_S = CASE_DEADLINE_S

    def of_size(self, size: int) -> Pool:
        if self._pool is None or self._pool.size != size:
            self.close()
            self._pool = Pool(size)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def judged(case: GradientCase, pools: Pools) -> Line:
    """Run one case."""
    begun = time.monotonic()
    try:
        answers = pools.of_size(case.ranks)(on_ranks, case, deadline_s=CASE_DEADLINE_S)
        errors, problems = verdict(case, answers, one_process(case))
    except CaseFailed as error:  # the pool starts anew
        errors, problems = {}, [str(error)[-1500:]]
    return {
        "name": case.name,
        "ranks": case.ranks,
        "verdict": "failed" if problems else "passed",
        "errors": errors,
        "problems": problems,
        "seconds": round(time.monotonic() - begun, 1),
    }


def run(cases: list[GradientCase], pools: Pools, *, minutes: float) -> Iterator[Line]:
    """A line a case, shown as it comes."""
    begun = time.monotonic()
    for index, case in enumerate(cases, start=1):
        if time.monotonic() - begun > minutes * 60:
            return
        line = judged(case, pools)
        shown = " ".join(f"{key} {error:.0e}" for key, error in line["errors"].items())
        left = (time.monotonic() - begun) / index * (len(cases) - index) / 60
        print(
            f"[{index}/{len(cases)}, {left:.0f} min left] {line['verdict']} in {line['seconds']} s, "
            f"{case.ranks} ranks: {case.name}: {shown}",
            *line["problems"], sep="\n    ", file=sys.stderr, flush=True,
        )  # fmt: skip
        yield line


def chosen(words: str) -> list[GradientCase]:
    """Those that have all the words; else the one that they name."""
    found = [case for case in triples() if set(words.split()) <= set(case.name.split())]
    return found or [GradientCase.named(words)]


def mutations(pools: Pools, *, only: str | None) -> int:
    """Print the case that catches each bug; 1 where one is not caught or another than is written down."""
    wrong = 0
    for name, bug in BUGS.items():
        if only and only not in name:
            continue
        found, problems = caught_by(name, pools.of_size)
        as_written = found == bug.case
        wrong += not as_written
        mark = "" if as_written else f"; written down: {bug.case!r}"
        print(f"{name}: {found or 'NOT CAUGHT'}{mark}", *problems[:2], sep="\n    ", flush=True)
    return int(wrong > 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="no new case after these")
    parser.add_argument("--only", help="cases with these words; write nothing")
    parser.add_argument("--json", action="store_true", help="print every line as JSON")
    parser.add_argument("--mutations", action="store_true", help="which case catches which bug")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "gradients.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "gradients.md")
    parser.add_argument("--proven", type=Path, default=ROOT / "lmscale" / "config" / "proven.json")
    return parser.parse_args()


def main() -> int:
    args, pools = arguments(), Pools()
    torch.set_num_threads(1)
    try:
        if args.mutations:
            return mutations(pools, only=args.only)
        if args.only:
            lines = list(run(by_world(chosen(args.only)), pools, minutes=args.minutes))
        else:
            proofs, cases = Proofs(args.results.absolute(), sources=digest()), triples()
            done = {line["name"] for line in proofs.lines}
            left = by_world([case for case in cases if case.name not in done])
            for line in run(left, pools, minutes=args.minutes):
                proofs.append(**line)
            wanted = {case.name for case in cases}
            lines = [line for line in proofs.lines if line["name"] in wanted]
            write_page(args.page, page(lines, len(cases)))
            if len(lines) == len(cases):
                write_proven(args.proven, lines)
    finally:
        pools.close()
    if args.json:
        print(*(json.dumps(line) for line in lines), sep="\n")
    failed = [line["name"] for line in lines if line["verdict"] == "failed"]
    print(f"{len(lines) - len(failed)} of {len(lines)} passed", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
