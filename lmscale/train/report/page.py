"""report.html of a run: one file to open, print or mail. No network, no JavaScript.

A report is a pure function of the run folder: the same files give the same bytes. The page is the
template page.html.j2, which escapes all text; this module computes the values that it shows.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lmscale.base.fs import atomic_write
from lmscale.base.units import show_count, show_seconds
from lmscale.run_folder.paths import RunFolder
from lmscale.train.report import charts, summary
from lmscale.train.report.charts import Chart, Frame, Marks, Series
from lmscale.train.report.read import Evaluation, RecordedEvent, RunHistory, read_record

_MAX_CORPORA = 6  # with a chart of their own
_MAX_RESULTS = 20  # rows of validation results
_MAX_EVENTS = 200
_MAX_SAMPLES = 4
_METRICS = {"loss": "Loss (nats per token)", "bits_per_byte": "Bits per byte"}

# title, unit, column, format of the axis
_NOISY: tuple[tuple[str, str, str, charts.Show], ...] = (
    ("Gradient norm", "before clipping", "grad_norm", lambda y: f"{y:g}"),
    ("Throughput", "tokens per second", "tokens_per_s", show_count),
    ("MFU", "share of the peak", "mfu", lambda y: f"{100 * y:g} %"),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its heading; `small` charts are shown in two columns."""

    title: str
    unit: str
    svg: Markup
    note: str
    small: bool = False
    across: bool = False  # a small chart over both columns


@dataclass(frozen=True, slots=True)
class Column:
    """The heading of a table's column and the CSS class of its cells."""

    heading: str
    style: str = ""  # "number", "short" (never wrapped) or ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text; the rows in `bold` are emphasised."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    note: str = ""
    bold: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Sample:
    """A text written by the model."""

    step: str
    prompt: str
    text: str


def write_report(folder: RunFolder) -> Path:
    """Read the run folder and write its report.html atomically.

    Takes about a second, and some seconds for a million steps.
    """
    page = render(read_record(folder))
    atomic_write(folder.report, page.encode(), durable=False)  # it can be made again
    return folder.report


def render(history: RunHistory) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("lmscale.train.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        name=history.name,
        status=summary.status(history),
        about=_about(history),
        verdict=" ".join(summary.verdict(history)),
        tiles=summary.tiles(history),
        figures=list(_figures(history)) if len(history.steps) else [],
        samples=_samples(history),
        validation=_validation(history),
        environment=_environment(history),
        attempts=_attempts(history),
        config=history.config_text.rstrip("\n"),
        events=_events(history),
        event_count=f"{len(history.events):,}",
        last_event=_clock(next((e.time for e in reversed(history.events) if e.time), None)),
    )


def marks(history: RunHistory) -> Marks:
    """Steps of saves and restarts; a restart is an attempt that resumes from a step of its run."""
    saves = {int(s) for e in history.of_kind("save") if (s := e.number("step")) is not None}
    restarts = {_from_step(e) or 0 for e in history.of_kind("attempt", "restart")}
    return Marks(sorted(saves), sorted(s for s in restarts if s > 0))


def _about(history: RunHistory) -> str:
    shape = [
        f"{value:,} {name}"
        for key, name in (("model.num_layers", "layers"), ("model.num_heads", "heads"))
        if isinstance(value := history.config(key), int)
    ]
    width = history.config("model.hidden_size")
    shape += [f"width {width:,}"] if isinstance(width, int) else []
    batch, length = history.config("train.global_batch_size"), history.config("train.seq_len")
    are_sizes = isinstance(batch, int) and isinstance(length, int)
    sizes = f"{batch:,} × {length:,} tokens per step" if are_sizes else ""
    engine = [history.config("engine.kind"), history.config("engine.precision")]
    parts = [", ".join(shape), sizes, " ".join(str(x) for x in engine if x)]
    return " · ".join(part for part in parts if part)


def _figures(history: RunHistory) -> Iterator[Figure]:
    steps, loss = history.steps, history.columns["loss"]
    frame = Frame(first=int(steps[0]), last=int(steps[-1]), log_x=False, marks=marks(history))
    log_x = charts.wants_log_x(steps, charts.smooth(loss))
    yield _loss_figure(history, replace(frame, log_x=log_x))
    yield from _bits_figures(history, frame)
    yield from _small_figures(history, frame)


def _loss_figure(history: RunHistory, frame: Frame) -> Figure:
    points = [
        (e.step, e.values["loss"]) for e in summary.of_first_corpus(history) if "loss" in e.values
    ]
    series = Series("Loss over steps", history.steps, history.columns["loss"], lambda y: f"{y:g}")
    scale = "Steps are on a logarithmic scale: most of the drop comes early." if frame.log_x else ""
    return _figure("Loss", "nats per token", charts.loss_chart(frame, series, points), note=scale)


def _bits_figures(history: RunHistory, frame: Frame) -> Iterator[Figure]:
    for corpus in history.corpora[:_MAX_CORPORA]:
        points = [
            (e.step, e.values["bits_per_byte"])
            for e in history.evaluations
            if e.corpus == corpus and "bits_per_byte" in e.values
        ]
        if not points:
            continue
        levels = {
            name: history.baselines[corpus][name]
            for name in ("unigram", "bigram")
            if name in history.baselines.get(corpus, {})
        }
        # The whole path makes the title unique, and with it the ids inside the SVG.
        chart = charts.bits_chart(frame, f"Bits per byte of {corpus} over steps", points, levels)
        yield _figure(f"Validation on {summary.short_corpus(corpus)}", "bits per byte", chart)


def _small_figures(history: RunHistory, frame: Frame) -> Iterator[Figure]:
    def series(title: str, column: str, show: charts.Show) -> Series:
        return Series(f"{title} over steps", history.steps, history.columns[column], show)

    rate = charts.line_chart(frame, series("Learning rate", "lr", lambda y: f"{y:g}"))
    yield _figure("Learning rate", "", rate, small=True)
    measured = [row for row in _NOISY if np.isfinite(history.columns[row[2]]).any()]
    for index, (title, unit, column, show) in enumerate(measured):
        across = index == len(measured) - 1 and len(measured) % 2 == 0  # alone in its row
        size = charts.LOW if across else charts.HALF
        chart = charts.noisy_chart(frame, series(title, column, show), size=size)
        yield _figure(title, unit, chart, small=True, across=across)


def _figure(
    title: str,
    unit: str,
    chart: Chart,
    *,
    note: str = "",
    small: bool = False,
    across: bool = False,
) -> Figure:
    if chart.above:
        plural = "value lies" if chart.above == 1 else "values lie"
        note = f"{note} {chart.above:,} {plural} above the chart.".strip()
    svg = Markup(chart.svg)  # written by matplotlib, which escapes the text in it
    return Figure(title, unit, svg, note, small=small, across=across)


def _samples(history: RunHistory) -> list[Sample]:
    """The newest text of each prompt."""
    newest: dict[str, Sample] = {}
    for event in history.of_kind("sample"):
        prompt, text = (str(event.fields.get(name, "")) for name in ("prompt", "text"))
        step = event.number("step")
        text = text.removeprefix(prompt)  # some writers repeat the prompt
        newest[prompt] = Sample("" if step is None else f"{step:,.0f}", prompt, text)
    return list(newest.values())[-_MAX_SAMPLES:]


def _validation(history: RunHistory) -> Table | None:
    """Results by corpus and step, a selection where there are many."""
    if not history.evaluations:
        return None
    several = len(history.corpora) > 1
    metrics = [m for m in _METRICS if any(m in e.values for e in history.evaluations)]
    levels = history.baselines.values()
    baselines = [name for name in ("unigram", "bigram") if any(name in b for b in levels)]
    columns = [Column("Step", "number"), *([Column("Corpus")] if several else [])]
    columns += [Column(_METRICS[m], "number") for m in metrics]
    columns += [Column(f"Against {name}", "number") for name in baselines]
    columns += [Column("Targets", "number")]
    best = summary.best_evaluation(history)
    best_result = best[0] if best else None
    rows, bold = [], set()
    for index, e in enumerate(_selection(history, best_result)):
        row = [f"{e.step:,}", *([summary.short_corpus(e.corpus)] if several else [])]
        row += [_number(e.values.get(m)) for m in metrics]
        bits = e.values.get("bits_per_byte", math.nan)
        row += [_change(bits, history.baselines.get(e.corpus, {}).get(b)) for b in baselines]
        rows.append([*row, "–" if e.count is None else f"{e.count:,.0f}"])
        if e is best_result:
            bold.add(index)
    corpus = f" result of {summary.short_corpus(history.corpora[0])}" if several else " result"
    note = f"The best{corpus} is in bold."
    if len(rows) < len(history.evaluations):
        note += f" {len(rows)} of {len(history.evaluations)} are shown; all are in eval.jsonl."
    return Table(columns, rows, note, frozenset(bold))


def _selection(history: RunHistory, best: Evaluation | None) -> list[Evaluation]:
    """Evaluations by step: always the first, the last and the best, the others evenly spread."""
    steps = sorted({e.step for e in history.evaluations})
    rows = max(_MAX_RESULTS // len(history.corpora), 3)
    if len(steps) > rows:
        spread = {steps[round(i * (len(steps) - 1) / (rows - 1))] for i in range(rows)}
        steps = sorted(spread | ({best.step} if best else set()))
    selected = set(steps)
    return sorted((e for e in history.evaluations if e.step in selected), key=lambda e: e.step)


def _environment(history: RunHistory) -> list[tuple[str, str]]:
    """Machine and software of the newest start, as names and values."""
    newest = history.of_kind("environment")[-1:]
    return [
        (key.replace("_", " "), _plain(value))
        for event in newest
        for key, value in event.fields.items()
        if value is not None
    ]


def _attempts(history: RunHistory) -> Table | None:
    """One row per attempt: where it began, how long it ran, how it ended."""
    attempts = history.of_kind("attempt")
    if not attempts:
        return None
    rows = []
    for index, event in enumerate(attempts):
        of_start = [e for e in history.events if e.start == event.start]
        times = [e.time for e in of_start if e.time is not None]
        ran = times[-1] - event.time if times and event.time is not None else None
        number, step = event.number("attempt", "k"), _from_step(event)
        row = [
            f"{index + 1 if number is None else int(number)}",
            "–" if step is None else f"{step:,}",
            _clock(event.time),
            "–" if ran is None else show_seconds(ran),
            _end(of_start, is_newest=index == len(attempts) - 1),
            _placement(event, of_start),
        ]
        rows.append(row)
    columns = [Column("Attempt", "number"), Column("From step", "number")]
    columns += [Column("Began (UTC)", "short"), Column("Ran", "number"), Column("End")]
    return Table([*columns, Column("Details")], rows)


def _from_step(event: RecordedEvent) -> int | None:
    """The step that an attempt resumes from."""
    step = event.number("from", "from_step", "step")
    return None if step is None else int(step)


def _end(of_start: Sequence[RecordedEvent], *, is_newest: bool) -> str:
    code = next((c for e in reversed(of_start) if (c := summary.exit_code(e)) is not None), None)
    if code is not None:
        return summary.end_text(code)
    if any(e.kind == "stop" for e in of_start):
        return "stopped on request"
    return "–" if is_newest else "died without an exit event"


def _placement(attempt: RecordedEvent, of_start: Sequence[RecordedEvent]) -> str:
    """Fields of the attempt and of the start it belongs to, each once."""
    sources = [e.fields for e in of_start if e.kind == "start"] + [attempt.fields]
    fields = {key: value for source in sources for key, value in source.items()}
    shown_elsewhere = ("attempt", "k", "from", "from_step", "step", "parameters", "total_steps")
    return _pairs({key: value for key, value in fields.items() if key not in shown_elsewhere})


def _events(history: RunHistory) -> Table | None:
    """All events by time, except samples and the environment, which have sections of their own."""
    events = [e for e in history.events if e.kind not in ("sample", "environment")]
    if not events:
        return None
    rows = []
    for event in events:
        step = event.number("step")
        fields = {key: value for key, value in event.fields.items() if key != "step"}
        step_text = "" if step is None else f"{step:,.0f}"
        rows.append([_clock(event.time), event.kind, step_text, _pairs(fields)])
    omitted = len(rows) - _MAX_EVENTS
    if omitted > 0:
        head = _MAX_EVENTS // 4
        gap = ["", f"{omitted:,} more in events/", "", ""]
        rows = [*rows[:head], gap, *rows[head + omitted :]]
    columns = [Column("Time (UTC)", "short"), Column("Event", "short"), Column("Step", "number")]
    return Table([*columns, Column("Details")], rows)


def _pairs(fields: Mapping[str, object]) -> str:
    return " · ".join(
        f"{key.replace('_', ' ')} {_plain(value)}"
        for key, value in fields.items()
        if value is not None
    )


def _plain(value: object) -> str:
    match value:
        case str():
            text = value
        case bool():
            text = "yes" if value else "no"
        case int():
            text = f"{value:,}" if abs(value) < 10_000_000 else show_count(value)
        case float():
            text = f"{value:.4g}"
        case Mapping():
            text = ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
        case list():
            text = ", ".join(map(_plain, value))
        case _:
            text = json.dumps(value)
    return text if len(text) <= 300 else text[:299] + "…"


def _clock(time: float | None) -> str:
    if time is None:
        return "–"
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if math.isfinite(value) else "not finite"


def _change(value: float, level: float | None) -> str:
    if not level or not math.isfinite(value):
        return "–"
    share = 100 * (value / level - 1)
    return f"{'+' if share >= 0 else '−'}{abs(share):.1f} %"
