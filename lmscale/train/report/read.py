"""The files of a run folder that a report shows, read into a RunHistory.

Reading is tolerant: a report is also written for runs that are still in progress, that were killed
in the middle of a line, or that have no evaluations and no events.
"""

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmscale.base.records import readable_lines
from lmscale.config.earlier_keys import translate_config
from lmscale.config.yaml import parse
from lmscale.run_folder.paths import RunFolder

COLUMNS = ("loss", "tokens", "lr", "grad_norm", "tokens_per_s", "mfu")


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """One line of events/START.jsonl."""

    start: str  # the file's stem: which start of the run wrote it
    kind: str
    time: float | None  # unix seconds
    fields: Mapping[str, Any]  # all other fields that are about this event

    def number(self, *names: str) -> float | None:
        """The first of these fields that is a finite number."""
        return next((v for n in names if (v := finite(self.fields.get(n))) is not None), None)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One corpus at one step; metrics by name, e.g. loss and bits_per_byte."""

    step: int
    corpus: str
    values: Mapping[str, float]
    count: float | None  # targets behind the loss


@dataclass(frozen=True, slots=True)
class RunHistory:
    """A run as its folder records it. Columns are NaN where a line has null or no value."""

    name: str
    steps: np.ndarray  # int64, ascending, each once
    columns: Mapping[str, np.ndarray]  # float64, one for each of COLUMNS, as long as steps
    evaluations: tuple[Evaluation, ...]  # by corpus in the order of appearance, then by step
    baselines: Mapping[str, Mapping[str, float]]  # corpus -> unigram | bigram -> bits per byte
    events: tuple[RecordedEvent, ...]  # by time
    config_text: str
    config_tree: object  # the same, decoded; None if it is missing or not YAML

    def config(self, path: str) -> Any:
        """A key of the run file such as "train.steps"; None if it is absent."""
        node: Any = self.config_tree
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    @property
    def corpora(self) -> list[str]:
        """Corpora with an evaluation, in the order of appearance."""
        return list(dict.fromkeys(e.corpus for e in self.evaluations))

    def of_kind(self, *kinds: str) -> list[RecordedEvent]:
        """Events of these kinds, by time."""
        return [event for event in self.events if event.kind in kinds]


def read_record(folder: RunFolder) -> RunHistory:
    """Read all that a report shows; a missing file counts as empty."""
    steps, columns = _metrics(folder.metrics)
    evaluations, baselines = _evaluations(folder.eval)
    events = [e for path in sorted(folder.events.glob("*.jsonl")) for e in _events(path)]
    events.sort(key=lambda event: event.time or 0.0)  # stable: a file's own order within a time
    text = folder.config.read_text("utf-8", "replace") if folder.config.is_file() else ""
    return RunHistory(
        name=folder.report.resolve().parent.name,
        steps=steps,
        columns=columns,
        evaluations=evaluations,
        baselines=baselines,
        events=tuple(events),
        config_text=text,
        config_tree=_tree(text),
    )


def finite(value: object) -> float | None:
    """The value as a float where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _tree(text: str) -> object:
    """The configuration; None if it is not YAML. Keys of an earlier version are translated."""
    return translate_config(parse(text, name="config.yaml").value)


def _metrics(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    steps = array("q")
    columns = {name: array("d") for name in COLUMNS}
    for line in readable_lines(path):
        step = finite(line.get("step"))
        if step is None:
            continue
        steps.append(int(step))
        for name, column in columns.items():
            value = finite(line.get(name))
            column.append(math.nan if value is None else value)
    steps_S = np.array(steps, np.int64)
    # of a step that was written twice, the later line counts
    unique_S, from_end_S = np.unique(steps_S[::-1], return_index=True)
    keep_S = len(steps_S) - 1 - from_end_S
    return unique_S, {name: np.array(c, np.float64)[keep_S] for name, c in columns.items()}


def _evaluations(path: Path) -> tuple[tuple[Evaluation, ...], dict[str, dict[str, float]]]:
    values: dict[str, dict[int, dict[str, float]]] = {}
    counts: dict[tuple[str, int], float | None] = {}
    baselines: dict[str, dict[str, float]] = {}
    for line in readable_lines(path):
        corpus, metric = str(line.get("corpus", "")), str(line.get("metric", ""))
        step, value = finite(line.get("step")), finite(line.get("value"))
        if metric.startswith("bits_per_byte_"):
            if value is not None:
                baselines.setdefault(corpus, {})[metric.removeprefix("bits_per_byte_")] = value
        elif step is not None:
            of_step = values.setdefault(corpus, {}).setdefault(int(step), {})
            of_step[metric] = math.nan if value is None else value
            if metric == "loss":
                counts[corpus, int(step)] = finite(line.get("count"))
    evaluations = tuple(
        Evaluation(step, corpus, metrics, counts.get((corpus, step)))
        for corpus, by_step in values.items()
        for step, metrics in sorted(by_step.items())
    )
    return evaluations, baselines


def _events(path: Path) -> Iterator[RecordedEvent]:
    for line in readable_lines(path):
        kind = str(line.get("kind", ""))
        # host and pid are in every line; only a start is about them, and the environment names the host
        excluded = {"kind", "time", "start", "ticks"}
        excluded |= (
            set() if kind == "start" else {"pid"} if kind == "environment" else {"pid", "host"}
        )
        fields = {key: value for key, value in line.items() if key not in excluded}
        yield RecordedEvent(path.stem, kind, finite(line.get("time")), fields)
