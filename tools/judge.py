"""Is a run what it should have been? Pure functions over its lines; each problem is a sentence."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import crc32c

Line = Mapping[str, Any]
Traced = Mapping[int, Mapping[str, Any]]  # by position
WHERE = ("corpus", "epoch", "sample")
_SHOWN = 3  # problems of one kind that are written out


def step_problems(lines: Sequence[Line], steps: int) -> Iterator[str]:
    """Exactly one line a step, in order."""
    found = [line["step"] for line in lines]
    if found != list(range(1, steps + 1)):
        missing = sorted(set(range(1, steps + 1)) - set(found))
        more = sorted({step for step in found if found.count(step) > 1})
        yield f"metrics.jsonl: not one line a step: missing {missing}, repeated {more}, {len(found)} lines"


def bitwise_problems(
    found: Sequence[Line], wanted: Sequence[Line], keys: Sequence[str], *, name: str
) -> Iterator[str]:
    """Every key of every line equal, floats to the last bit."""
    if len(found) != len(wanted):
        yield f"{name}: {len(found)} lines instead of {len(wanted)}"
    differing = [
        f"{name}: step {right['step']}: {key} is {left.get(key)!r}, uninterrupted {right.get(key)!r}"
        for left, right in zip(found, wanted, strict=False)
        for key in keys
        if left.get(key) != right.get(key)
    ]
    yield from _shortened(differing)


def worst(found: Sequence[Line], wanted: Sequence[Line], key: str) -> float:
    """Largest relative difference of `key` over all lines; infinite where lines are missing or not numbers."""
    if len(found) != len(wanted):
        return math.inf
    errors = [
        relative(left.get(key), right.get(key)) for left, right in zip(found, wanted, strict=True)
    ]
    return max(errors, default=math.inf)


def relative(found: float | None, wanted: float | None) -> float:
    """|found - wanted| / |wanted|; infinite where either is no finite number."""
    if found is None or wanted is None or not math.isfinite(found) or not math.isfinite(wanted):
        return math.inf
    return abs(found - wanted) / abs(wanted) if found != wanted else 0.0


def trace_of(lines: Iterable[Line]) -> tuple[dict[int, Line], list[str]]:
    """Trace lines of all ranks by position, and the positions that stand twice."""
    found: dict[int, Line] = {}
    twice = []
    for line in lines:
        if line["position"] in found:
            twice.append(f"trace: position {line['position']} was trained on twice")
        found[line["position"]] = line
    return found, list(_shortened(twice))


def trace_problems(
    traced: Traced, planned: Traced, *, batch: int, crc_of: Callable[[Line], int]
) -> Iterator[str]:
    """The trace equals the plan: positions, where each sample lies, the bytes, and the step it belongs to."""
    if missing := sorted(planned.keys() - traced.keys()):
        yield f"trace: {len(missing)} planned positions were not trained on, the first {missing[0]}"
    if more := sorted(traced.keys() - planned.keys()):
        yield f"trace: {len(more)} positions were not planned, the first {more[0]}"
    differing = []
    for position in sorted(traced.keys() & planned.keys()):
        line, row = traced[position], planned[position]
        if any(line[key] != row[key] for key in WHERE):
            differing.append(f"trace: position {position}: {dict(line)}, planned {dict(row)}")
        elif line["crc32c"] != crc_of(row):
            differing.append(f"trace: position {position}: other bytes than {row['shard']} holds")
        elif line["step"] != position // batch + 1:
            differing.append(f"trace: position {position} in step {line['step']}")
    yield from _shortened(differing)


def crc_in_shard(row: Line) -> int:
    """CRC32C of the bytes that a planned row names."""
    with Path(row["shard"]).open("rb") as file:
        file.seek(row["offset"])
        return int(crc32c.crc32c(file.read(row["bytes"])))


def _shortened(problems: Sequence[str]) -> Iterator[str]:
    yield from problems[:_SHOWN]
    if len(problems) > _SHOWN:
        yield f"... and {len(problems) - _SHOWN} more of these"
