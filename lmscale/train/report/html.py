"""The parts of a report's page around the charts, as HTML. All text of a run is escaped here."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape

from lmscale.base.units import show_count, show_seconds
from lmscale.train.report.read import Evaluation, RecordedEvent, RunHistory
from lmscale.train.report.words import (
    Status,
    Tile,
    best_evaluation,
    exit_code,
    how_it_ended,
    short_corpus,
)

_MOST_ROWS = 20  # of validation results
_MOST_EVENTS = 200
_MOST_SAMPLES = 4
_METRICS = {"loss": "Loss (nats per token)", "bits_per_byte": "Bits per byte"}

Cell = tuple[str, str]  # class of the cell, HTML


def emphasised(sentences: Iterable[str]) -> str:
    """Sentences as HTML; *text* is strong."""
    pieces = escape(" ".join(sentences)).split("*")
    return "".join(f"<strong>{p}</strong>" if i % 2 else p for i, p in enumerate(pieces))


def chip(status: Status) -> str:
    """The status beside the title."""
    return f'<span class="chip {status.mood}">{escape(status.text)}</span>'


def tile_list(tiles: Iterable[Tile]) -> str:
    """The summary."""
    return "".join(
        f"<div><dt>{escape(t.label)}</dt><dd>{escape(t.value)}<small>{escape(t.below)}</small></dd></div>"
        for t in tiles
    )


def samples(record: RunHistory) -> str:
    """The newest text of each prompt."""
    newest: dict[str, RecordedEvent] = {}
    for event in record.of_kind("sample"):
        newest[str(event.fields.get("prompt", ""))] = event
    if not newest:
        return ""
    quotes = "".join(_quote(e) for e in list(newest.values())[-_MOST_SAMPLES:])
    return (
        '<section class="long"><h2>Sampled text</h2>'
        f'<p class="note">Written by the model; the prompt is in bold.</p>{quotes}</section>'
    )


def validation_table(record: RunHistory) -> str:
    """Results by corpus and step, thinned where there are many."""
    if not record.evaluations:
        return ""
    several = len(record.corpora) > 1
    metrics = [m for m in _METRICS if any(m in e.values for e in record.evaluations)]
    baselines = [n for n in ("unigram", "bigram") if any(n in b for b in record.baselines.values())]
    head = [("n", "Step"), *([("", "Corpus")] if several else [])]
    head += [("n", _METRICS[m]) for m in metrics]
    head += [("n", f"Against {name}") for name in baselines]
    head += [("n", "Targets")]
    best = best_evaluation(record)
    best_at = best[0] if best else None
    rows = []
    for e in _thinned(record.evaluations, best_at, len(record.corpora)):
        cells: list[Cell] = [("n", f"{e.step:,}")]
        cells += [("", escape(short_corpus(e.corpus)))] if several else []
        cells += [("n", _number(e.values.get(m))) for m in metrics]
        own = record.baselines.get(e.corpus, {})
        bits = e.values.get("bits_per_byte", math.nan)
        cells += [("n", _change(bits, own.get(name))) for name in baselines]
        cells += [("n", "–" if e.count is None else f"{e.count:,.0f}")]
        rows.append(("best" if e is best_at else "", cells))
    shown, all_of = len(rows), len(record.evaluations)
    rest = f" {shown} of {all_of} are shown; all are in eval.jsonl." if shown < all_of else ""
    whose = f" of {escape(short_corpus(record.corpora[0]))}" if several else ""
    note = f'<p class="note">The best{whose} is in bold.{rest}</p>'
    return f'<section class="long"><h2>Validation results</h2>{note}{_table(head, rows)}</section>'


def environment(record: RunHistory) -> str:
    """The newest facts about machine and software."""
    found = record.of_kind("environment")
    if not found:
        return ""
    facts = "".join(
        f"<div><dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd></div>"
        for key, value in found[-1].fields.items()
        if value is not None
    )
    return f'<section class="long"><h2>Environment</h2><dl class="facts">{facts}</dl></section>'


def attempts(record: RunHistory) -> str:
    """One row an attempt: where it began, how long it ran, how it ended."""
    found = record.of_kind("attempt")
    if not found:
        return ""
    head = [("n", "Attempt"), ("n", "From step"), ("", "Began (UTC)"), ("n", "Ran"), ("", "End")]
    head += [("", "Where")]
    rows: list[tuple[str, list[Cell]]] = []
    for index, event in enumerate(found):
        of_start = [e for e in record.events if e.start == event.start]
        times = [e.time for e in of_start if e.time is not None]
        ran = times[-1] - event.time if times and event.time is not None else None
        number, step = event.number("attempt", "k"), from_step(event)
        cells = [
            ("n", f"{index + 1 if number is None else int(number)}"),
            ("n", "–" if step is None else f"{step:,}"),
            ("t", _clock(event.time)),
            ("n", "–" if ran is None else show_seconds(ran)),
            ("", escape(_end(of_start, is_newest=index == len(found) - 1))),
            ("", escape(_where(event, of_start))),
        ]
        rows.append(("", cells))
    kind = ' class="long"' if len(rows) > 12 else ""  # may a page break fall inside
    return f"<section{kind}><h2>Attempts</h2>{_table(head, rows)}</section>"


def from_step(event: RecordedEvent) -> int | None:
    """The step that an attempt resumes from."""
    step = event.number("from", "from_step", "step")
    return None if step is None else int(step)


def config(record: RunHistory) -> str:
    """The resolved run file."""
    if not record.config_text:
        return ""
    text = escape(record.config_text.rstrip("\n"))
    summary = "<summary>Configuration<small>config.yaml</small></summary>"
    return f'<details class="first">{summary}<pre>{text}</pre></details>'


def events(record: RunHistory) -> str:
    """What happened, in order; samples and the environment are shown elsewhere."""
    found = [e for e in record.events if e.kind not in ("sample", "environment")]
    if not found:
        return ""
    head = [("", "Time (UTC)"), ("", "Event"), ("n", "Step"), ("", "Details")]
    left_out = len(found) - _MOST_EVENTS
    if left_out > 0:
        found = found[: _MOST_EVENTS // 4] + found[left_out + _MOST_EVENTS // 4 :]
    rows: list[tuple[str, list[Cell]]] = []
    for index, e in enumerate(found):
        if left_out > 0 and index == _MOST_EVENTS // 4:
            rows.append(
                ("", [("", ""), ("word", f"{left_out:,} more in events/"), *[("", "")] * 2])
            )
        step = e.number("step")
        cells = [("t", _clock(e.time)), ("t", escape(e.kind))]
        cells += [
            ("n", "" if step is None else f"{step:,.0f}"),
            ("", _details(e, without=("step",))),
        ]
        rows.append(("", cells))
    count = f"<small>{len(record.events):,} lines in events/</small>"
    return f"<details><summary>Events{count}</summary>{_table(head, rows)}</details>"


def footer(record: RunHistory) -> str:
    """Where the numbers come from."""
    times = [e.time for e in record.events if e.time is not None]
    until = f" Last event: {_clock(times[-1])} UTC." if times else ""
    return (
        "Written by lmscale from metrics.jsonl, eval.jsonl, events/ and config.yaml of this run. "
        f"The files hold every step unrounded.{until}"
    )


def _quote(event: RecordedEvent) -> str:
    prompt, text = (str(event.fields.get(name, "")) for name in ("prompt", "text"))
    step = event.number("step")
    where = "" if step is None else f"<p>Step {step:,.0f}</p>"
    text = text.removeprefix(prompt)  # some writers repeat the prompt
    return f"<blockquote>{where}<pre><b>{escape(prompt)}</b>{escape(text)}</pre></blockquote>"


def _thinned(
    evaluations: Sequence[Evaluation], best: Evaluation | None, corpora: int
) -> list[Evaluation]:
    """By step; the first, the last and the best always, the others evenly spread."""
    steps = sorted({e.step for e in evaluations})
    rows = max(_MOST_ROWS // corpora, 3)
    if len(steps) > rows:
        kept = {steps[round(i * (len(steps) - 1) / (rows - 1))] for i in range(rows)}
        steps = sorted(kept | ({best.step} if best else set()))
    wanted = set(steps)
    return sorted((e for e in evaluations if e.step in wanted), key=lambda e: e.step)


def _table(head: Sequence[Cell], rows: Iterable[tuple[str, Sequence[Cell]]]) -> str:
    def cells(tag: str, row: Sequence[Cell]) -> str:
        return "".join(
            f'<{tag} class="{kind}">{text}</{tag}>' if kind else f"<{tag}>{text}</{tag}>"
            for kind, text in row
        )

    body = "".join(
        f"<tr{f' class={kind!r}' if kind else ''}>{cells('td', row)}</tr>" for kind, row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _end(of_start: Sequence[RecordedEvent], *, is_newest: bool) -> str:
    code = next((c for e in reversed(of_start) if (c := exit_code(e)) is not None), None)
    if code is not None:
        return how_it_ended(code)
    if any(e.kind == "stop" for e in of_start):
        return "stopped on request"
    return "–" if is_newest else "died without an exit event"


def _where(attempt: RecordedEvent, of_start: Sequence[RecordedEvent]) -> str:
    """Facts of the attempt and of the start it belongs to, each once."""
    told = [e.fields for e in of_start if e.kind == "start"] + [attempt.fields]
    known = {key: value for fields in told for key, value in fields.items()}
    shown_elsewhere = ("attempt", "k", "from", "from_step", "step", "parameters", "total_steps")
    return _pairs({key: value for key, value in known.items() if key not in shown_elsewhere})


def _details(event: RecordedEvent, *, without: Sequence[str]) -> str:
    return escape(_pairs({k: v for k, v in event.fields.items() if k not in without}))


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
