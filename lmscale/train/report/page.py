"""report.html of a run: one file that anybody can open, print or mail. No network, no JavaScript.

A report is a pure function of the run folder: written twice of the same files it is the same bytes.
"""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from lmscale.base.fs import atomic_write
from lmscale.base.units import show_count
from lmscale.run_folder.paths import RunFolder
from lmscale.train.report import charts, html, words
from lmscale.train.report.charts import Drawn, Frame, Marks, Series
from lmscale.train.report.read import RecordedEvent, RunHistory, read_record
from lmscale.train.report.shape import smooth, wants_log_x

_MOST_CORPORA = 6  # with a chart of their own

# title, unit, column, how a value reads
_NOISY: tuple[tuple[str, str, str, charts.Show], ...] = (
    ("Gradient norm", "before clipping", "grad_norm", lambda y: f"{y:g}"),
    ("Throughput", "tokens per second", "tokens_per_s", show_count),
    ("MFU", "share of the peak", "mfu", lambda y: f"{100 * y:g} %"),
)

# name -> what is drawn as the swatch (26 x 12 px), and what it stands for
_KEYS = {
    "raw": ('<path d="M0 8l4-5 4 6 4-7 5 8 4-6 5 4" stroke="var(--raw)"/>', "each step"),
    "smooth": (
        '<path d="M0 6h26" stroke="var(--train)" stroke-width="2.4"/>',
        "mean of neighbours",
    ),
    "valid": (
        '<path d="M0 6h26" stroke="var(--valid)"/><circle cx="13" cy="6" r="3.5"/>',
        "validation",
    ),
    "model": (
        '<path d="M0 6h26" stroke="var(--valid)" stroke-width="2"/>'
        '<circle cx="13" cy="6" r="3.5"/>',
        "model",
    ),
    "unigram": (
        '<path d="M0 6h26" stroke="var(--muted)" stroke-width="1.4" stroke-dasharray="7 3"/>',
        "unigram: counting single tokens",
    ),
    "bigram": (
        '<path d="M0 6h26" stroke="var(--muted)" stroke-width="1.4" stroke-dasharray="7 2 1.5 2"/>',
        "bigram: counting pairs of tokens",
    ),
    "saves": ('<path d="M0 11h26M5 11V6M13 11V6M21 11V6" stroke="var(--muted)"/>', "checkpoint"),
    "restarts": ('<path d="M13 0v12" stroke="var(--ink)" stroke-dasharray="1.5 2.5"/>', "restart"),
}


def write_report(folder: RunFolder) -> Path:
    """Read the run folder and write its report.html, whole or not at all.

    Takes about a second, and some seconds for a million steps.
    """
    page = render(read_record(folder))
    atomic_write(folder.report, page.encode(), durable=False)  # it can be made again
    return folder.report


def render(record: RunHistory) -> str:
    """The page as HTML."""
    template = files("lmscale.train.report").joinpath("report.html.in").read_text("utf-8")
    return Template(template).substitute(
        title=escape(f"{record.name} – training report"),
        status=html.chip(words.status(record)),
        name=escape(record.name),
        about=escape(_about(record)),
        verdict=html.emphasised(words.verdict(record)),
        tiles=html.tile_list(words.tiles(record)),
        charts=_charts(record) if len(record.steps) else "",
        samples=html.samples(record),
        validation=html.validation_table(record),
        environment=html.environment(record),
        attempts=html.attempts(record),
        config=html.config(record),
        events=html.events(record),
        footer=escape(html.footer(record)),
    )


def marks(record: RunHistory) -> Marks:
    """Steps of saves and restarts; a restart is an attempt that resumes from a step of its run."""
    saves = {int(s) for e in record.of_kind("save") if (s := e.number("step")) is not None}
    restarts = {_restart_step(e) for e in record.of_kind("attempt", "restart")}
    return Marks(sorted(saves), sorted(s for s in restarts if s > 0))


def _restart_step(event: RecordedEvent) -> int:
    return html.from_step(event) or 0


def _about(record: RunHistory) -> str:
    shape = [
        f"{value:,} {what}"
        for key, what in (("model.num_layers", "layers"), ("model.num_heads", "heads"))
        if isinstance(value := record.config(key), int)
    ]
    width = record.config("model.hidden_size")
    shape += [f"width {width:,}"] if isinstance(width, int) else []
    batch, length = record.config("train.global_batch_size"), record.config("train.seq_len")
    sizes = f"{batch:,} × {length:,} tokens a step" if _whole(batch) and _whole(length) else ""
    engine = [record.config("engine.kind"), record.config("engine.precision")]
    parts = [", ".join(shape), sizes, " ".join(str(x) for x in engine if x)]
    return " · ".join(part for part in parts if part)


def _charts(record: RunHistory) -> str:
    steps, loss = record.steps, record.columns["loss"]
    even = Frame(first=int(steps[0]), last=int(steps[-1]), log_x=False, marks=marks(record))
    of_loss = replace(even, log_x=wants_log_x(steps, smooth(loss)))
    return "".join((_loss(record, of_loss), _bits(record, even), _small_charts(record, even)))


def _loss(record: RunHistory, frame: Frame) -> str:
    points = [
        (e.step, e.values["loss"]) for e in words.of_first_corpus(record) if "loss" in e.values
    ]
    series = Series("Loss over steps", record.steps, record.columns["loss"], lambda y: f"{y:g}")
    drawn = charts.loss_chart(frame, series, points)
    keys = ["smooth", "raw", *(["valid"] if points else []), *_mark_keys(frame)]
    scale = "Steps on a logarithmic scale: most happens early." if frame.log_x else ""
    return _section("Loss", "nats per token", drawn, keys=keys, note=scale)


def _bits(record: RunHistory, frame: Frame) -> str:
    out = []
    for corpus in record.corpora[:_MOST_CORPORA]:
        points = [
            (e.step, e.values["bits_per_byte"])
            for e in record.evaluations
            if e.corpus == corpus and "bits_per_byte" in e.values
        ]
        if not points:
            continue
        levels = {
            name: record.baselines[corpus][name]
            for name in ("unigram", "bigram")
            if name in record.baselines.get(corpus, {})
        }
        name = f"Validation on {words.short_corpus(corpus)}"
        drawn = charts.bits_chart(frame, f"{name}: bits per byte over steps", points, levels)
        out.append(_section(name, "bits per byte", drawn, keys=["model", *levels]))
    return "".join(out)


def _small_charts(record: RunHistory, frame: Frame) -> str:
    def series(title: str, column: str, show: charts.Show) -> Series:
        return Series(f"{title} over steps", record.steps, record.columns[column], show)

    rate = charts.line_chart(frame, series("Learning rate", "lr", lambda y: f"{y:g}"))
    sections = [_section("Learning rate", "", rate)]
    known = [row for row in _NOISY if np.isfinite(record.columns[row[2]]).any()]
    for index, (title, unit, column, show) in enumerate(known):
        alone = index == len(known) - 1 and len(known) % 2 == 0  # in its row, beside nothing
        size = charts.LOW if alone else charts.HALF
        drawn = charts.noisy_chart(frame, series(title, column, show), size=size)
        sections.append(_section(title, unit, drawn, across=alone))
    return f'<div class="pair">{"".join(sections)}</div>'


def _mark_keys(frame: Frame) -> list[str]:
    return [name for name in ("saves", "restarts") if getattr(frame.marks, name)]


def _section(
    title: str,
    unit: str,
    drawn: Drawn,
    *,
    keys: Sequence[str] = (),
    note: str = "",
    across: bool = False,
) -> str:
    if drawn.above:
        plural = "value lies" if drawn.above == 1 else "values lie"
        note = f"{note} {drawn.above:,} {plural} above the chart.".strip()
    small = f" <small>{unit}</small>" if unit else ""
    key = "".join(
        f'<span><svg viewBox="0 0 26 12" fill="none">{_KEYS[name][0]}</svg>{_KEYS[name][1]}</span>'
        for name in keys
    )
    kind = ' class="across"' if across else ""
    caption = f'<figcaption class="note">{escape(note)}</figcaption>' if note else ""
    return (
        f"<section{kind}><h2>{escape(title)}{small}</h2>"
        + (f'<p class="key">{key}</p>' if key else "")
        + f"<figure>{drawn.svg}{caption}</figure></section>"
    )


def _whole(value: object) -> bool:
    return isinstance(value, int)
