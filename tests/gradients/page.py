"""What the gradient matrix has found, written down: docs/gradients.md for people, proven.json for the config check."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from results import Line, facts, provenance, table

from lmscale.config.proven import FACTORS, OPEN, clash
from tests.gradients.case import VALUES, GradientCase, problem, word_of
from tests.gradients.cover import REFUSED, TRIPLE_VALUES
from tests.gradients.errors import KEYS, TOLERANCE

_ROWS = ("engine", "tp")
_USUAL = {
    ("sequence_parallel", "off"): "whole",
    ("recompute", "none"): "kept",
    ("offload", "none"): "resident",
    ("compile", "off"): "eager",
    ("reshard", "on"): "resharded",
    ("dropout", "off"): "no dropout",
    ("accumulation", "1"): "one micro-batch",
    ("targets", "equal"): "equal",
    ("clip", "off"): "unclipped",
}


def proven(lines: Sequence[Line]) -> dict[str, Any]:
    """The table that lmscale/config/proven.py reads. Masks that torch draws prove nothing about those of a run."""
    passed = [GradientCase.named(line["name"]) for line in lines if line["verdict"] == "passed"]
    cases = [
        {
            **{factor: case.words[factor] for factor in (*FACTORS, *OPEN)},
            "ranks": case.ranks,
            "dp": case.dp,
        }
        for case in passed
        if case.dropout != "drawn"
    ]
    found = provenance()
    return {
        "commit": found["commit"],
        "sources": found["sources"],
        "versions": found["versions"],
        "cases": cases,
        "refused": [*(dict(entry) for entry in REFUSED), *_failed(lines)],
    }


def _failed(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Combinations of which a case failed: refused as they are, though each three of their words may have passed."""
    for line in lines:
        if line["verdict"] == "failed":
            words = GradientCase.named(line["name"]).words
            factors = {factor: words[factor] for factor in FACTORS}
            yield {
                "factors": factors,
                "why": "it did not give the gradients of one process",
                "nearest": "",
            }


def write_proven(path: Path, lines: Sequence[Line]) -> None:
    """One case a line, so that a diff shows which."""
    document = proven(lines)
    parts = []
    for key, value in document.items():
        if isinstance(value, list):
            inner = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            parts.append(f"  {json.dumps(key)}: [\n{inner}\n  ]" if value else f'  "{key}": []')
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def page(lines: Sequence[Line], wanted: int) -> Iterator[str]:
    """docs/gradients.md."""
    passed = [line for line in lines if line["verdict"] == "passed"]
    yield "# Gradients: every combination against one process"
    yield "Written by `make matrix`; do not edit. What it means and how to read it: tests/README.md."
    yield f"**{len(passed)} of {wanted} cases passed.**" + (
        "" if len(lines) == wanted else f" {wanted - len(lines)} were not run yet."
    )
    yield facts(provenance())
    yield "## How close"
    yield (
        "The largest error of all cases in a precision, and in brackets what is allowed: more only for a tensor of "
        "which one process in this precision is more than half as far off one in the next wider. Gradient: of each "
        "parameter at the first step. Update: of each parameter after three steps, relative to how far it went. "
        "Zero: of gradients that vanish in theory, relative to the average."
    )
    yield table(("precision", "cases", *KEYS), _closeness(lines))
    yield "## Proven"
    yield (
        "A run is proven when each three of its words, with those that a restart may change, occur in a case that "
        "passed. Here: the word on top with the engine and tp on the left. yes: passed with them; a dash: there is "
        "no such run, for the reasons below; **no**: refused. tp 8 takes all eight ranks and is run once an engine "
        "(not under hsdp, which would need more), other sizes count as the largest here."
    )
    columns = [(f, v) for f, values in TRIPLE_VALUES.items() if f not in _ROWS for v in values]
    yield table(
        ("", *(_USUAL.get(point, word_of(*point)) for point in columns)), _grid(passed, columns)
    )
    yield "## Refused"
    yield "\n".join(
        f"- {' '.join(word_of(*point) for point in entry['factors'].items())}: {entry['why']}"
        for entry in REFUSED
    )
    yield "\n".join(f"- {words}: {why}" for words, why in _impossible())
    yield "\n".join(
        f"- **failed** {line['name']}: {'; '.join(line['problems'])}"
        for line in lines
        if line["verdict"] == "failed"
    )
    yield "## Cases"
    yield table(("case", "ranks", *KEYS), _rows(lines))


def _impossible() -> Iterator[tuple[str, str]]:
    """The dashes of the table that is by engine alone, with their reason; other checks of the config say so."""
    for (factor, values), engine in product(TRIPLE_VALUES.items(), VALUES["engine"]):
        for value in values if factor not in _ROWS else ():
            if why := clash({"engine": engine, factor: value}):
                yield f"{engine} {word_of(factor, value)}", why


def _closeness(lines: Sequence[Line]) -> Iterator[list[object]]:
    for precision in VALUES["precision"]:
        of = [line for line in lines if precision in line["name"].split() and line["errors"]]
        if of:
            worst = {key: max(line["errors"][key] for line in of) for key in KEYS}
            allowed = TOLERANCE[precision]
            yield [precision, len(of), *(f"{worst[key]:.0e} ({allowed[key]:.0e})" for key in KEYS)]


def _grid(passed: Sequence[Line], columns: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    cases = [GradientCase.named(line["name"]).words for line in passed]
    for engine, tp in product(VALUES["engine"], VALUES["tp"]):
        row = {"engine": engine, "tp": tp}
        if not problem(row):
            yield [f"{engine} tp{tp}", *(_cell({**row, f: v}, cases) for f, v in columns)]


def _cell(words: Mapping[str, str], cases: Sequence[Mapping[str, str]]) -> str:
    if any(words.items() <= case.items() for case in cases):
        return "yes"
    if problem(words):
        return "-"
    return "" if words["tp"] == "8" else "**no**"


def _rows(lines: Sequence[Line]) -> Iterator[list[object]]:
    for line in sorted(lines, key=lambda line: line["name"]):
        errors = (
            [f"{line['errors'][key]:.0e}" for key in KEYS] if line["errors"] else [""] * len(KEYS)
        )
        mark = "" if line["verdict"] == "passed" else "**failed** "
        yield [mark + line["name"], line["ranks"], *errors]
