"""The summary of a run: its status, its verdict in sentences, and the numbers on the tiles."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lmscale.base.errors import ExitCode
from lmscale.base.units import show_count, show_seconds
from lmscale.train.report.charts import half_width, smooth
from lmscale.train.report.read import Evaluation, RecordedEvent, RunHistory

_ENDS = {
    ExitCode.DONE: "done",
    ExitCode.BUG: "failed: a bug",
    ExitCode.USAGE: "refused: command line",
    ExitCode.DATA: "failed: damaged data",
    ExitCode.RETRY: "failed: may be tried again",
    ExitCode.CONFIG: "refused: configuration",
    ExitCode.SAVED: "saved and stopped on request",
    ExitCode.DIVERGED: "diverged",
    ExitCode.OVERTAKEN: "overtaken by a newer attempt",
}


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the run; mood is "good", "bad" or "" (neutral)."""

    text: str
    mood: str = ""


@dataclass(frozen=True, slots=True)
class Tile:
    """One number of the summary."""

    label: str
    value: str
    below: str = ""


def status(history: RunHistory) -> Status:
    """Finished, stopped, failed or running: by the steps done and the newest start's events."""
    last = int(history.steps[-1]) if len(history.steps) else 0
    total = total_steps(history)
    if total and last >= total:
        return Status("finished", "good")
    newest = _since_newest_start(history)
    code = next((c for e in reversed(newest) if (c := exit_code(e)) is not None), None)
    if code is not None:
        mood = "" if code in (ExitCode.DONE, ExitCode.SAVED) else "bad"
        end = f"stopped at step {last:,}" if code == ExitCode.DONE else end_text(code)
        return Status(end, mood)
    if any(event.kind == "stop" for event in newest):
        return Status(f"stopped at step {last:,}")
    return Status(f"at step {last:,} of {total:,}" if total else f"at step {last:,}")


def end_text(code: int) -> str:
    """An exit code as text."""
    if code in _ENDS:
        return _ENDS[ExitCode(code)]
    return f"died by signal {code - 128}" if code > 128 else f"exit code {code}"


def exit_code(event: RecordedEvent) -> int | None:
    """The exit code in the last event of a start; None for other events."""
    code = event.number("code", "exit_code") if event.kind in ("exit", "stop") else None
    return None if code is None else int(code)


def total_steps(history: RunHistory) -> int | None:
    """The configured number of steps, from the run file or else from an event."""
    values = [e.number("total_steps") for e in history.of_kind("attempt", "start")]
    for value in [history.config("train.steps"), *reversed(values)]:
        if isinstance(value, (int, float)) and value > 0:
            return int(value)
    return None


def verdict(history: RunHistory) -> list[str]:
    """Sentences; text between asterisks is for emphasis."""
    if not len(history.steps):
        return ["No step has finished yet."]
    return [_training(history), *_not_finite(history), *_validation(history)]


def tiles(history: RunHistory) -> list[Tile]:
    """Steps, tokens, wall time, speed, size and best validation."""
    steps = int(history.steps[-1]) if len(history.steps) else 0
    total, tokens = total_steps(history), tokens_seen(history)
    speed = median(history.columns["tokens_per_s"])
    mfu = median(history.columns["mfu"])
    wall, in_steps = wall_seconds(history), _seconds_in_steps(history)
    parameters = parameter_count(history)
    best = best_evaluation(history)
    unknown = "–"
    return [
        Tile("Steps", _whole(steps), f"of {_whole(total)}" if total else ""),
        Tile("Tokens", show_count(tokens), _per_step(history)),
        Tile(
            "Wall time",
            unknown if wall is None else show_seconds(wall),
            "" if in_steps is None else f"{show_seconds(in_steps)} in steps",
        ),
        Tile(
            "Tokens/s",
            unknown if speed is None else show_count(speed),
            "median"
            if mfu is None
            else f"median, MFU\N{NO-BREAK SPACE}{100 * mfu:.1f}\N{NO-BREAK SPACE}%",
        ),
        Tile("Parameters", unknown if parameters is None else show_count(parameters)),
        _best_tile(best),
    ]


def tokens_seen(history: RunHistory) -> float:
    """Tokens after the last step."""
    finite = history.columns["tokens"][np.isfinite(history.columns["tokens"])]
    return float(finite[-1]) if len(finite) else 0.0


def median(values: np.ndarray) -> float | None:
    """The median of the finite values; None if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def parameter_count(history: RunHistory) -> float | None:
    """The number of parameters, from the newest event that has it."""
    values = [e.number("parameters") for e in history.of_kind("environment", "start", "attempt")]
    return next((value for value in reversed(values) if value is not None), None)


def wall_seconds(history: RunHistory) -> float | None:
    """First to last event of each start, added up: waiting in a queue is not counted."""
    by_start: dict[str, list[float]] = {}
    for event in history.events:
        if event.time is not None:
            by_start.setdefault(event.start, []).append(event.time)
    spans = [times[-1] - times[0] for times in by_start.values()]
    return sum(spans) if any(span > 0 for span in spans) else None


def best_evaluation(history: RunHistory) -> tuple[Evaluation, str] | None:
    """The lowest bits per byte of the first corpus (else the lowest loss), and which of the two."""
    for metric in ("bits_per_byte", "loss"):
        finite = [
            e for e in of_first_corpus(history) if math.isfinite(e.values.get(metric, math.nan))
        ]
        if finite:
            return min(finite, key=lambda e: e.values[metric]), metric
    return None


def of_first_corpus(history: RunHistory) -> list[Evaluation]:
    """The evaluations of the corpus that the verdict is about."""
    corpora = history.corpora
    return [e for e in history.evaluations if e.corpus == corpora[0]] if corpora else []


def short_corpus(corpus: str) -> str:
    """A corpus's name for a heading: the last two parts of a path."""
    return "/".join(corpus.replace("\\", "/").rstrip("/").split("/")[-2:]) or "corpus"


def _training(history: RunHistory) -> str:
    steps, count = int(history.steps[-1]), len(history.steps)
    loss = float(smooth(history.columns["loss"])[-1])
    behind = half_width(count) + 1
    over = f" (mean of the last {behind:,} steps)" if behind > 1 else ""
    plural = "step" if steps == 1 else "steps"
    value = f"*{loss:.3f}* nats per token{over}" if math.isfinite(loss) else "*not finite*"
    tokens = show_count(tokens_seen(history))
    return f"After {steps:,} {plural} and {tokens} tokens the training loss is {value}."


def _not_finite(history: RunHistory) -> list[str]:
    count = int((~np.isfinite(history.columns["loss"])).sum())
    return [f"The loss was not finite at {count:,} of the steps."] if count else []


def _validation(history: RunHistory) -> list[str]:
    evaluations, best = of_first_corpus(history), best_evaluation(history)
    if not evaluations or best is None:
        return ["No validation was measured."]
    best_at, metric = best
    last = evaluations[-1].values.get(metric, math.nan)
    where = f" on {short_corpus(best_at.corpus)}" if len(history.corpora) > 1 else ""
    if not math.isfinite(last):
        first = f"The last validation{where} is *not finite*."
    elif metric == "loss":
        first = f"The validation loss{where} is *{last:.3f}* nats per token."
    else:
        beside = _against(last, history.baselines.get(best_at.corpus, {}))
        first = f"Validation{where} is at *{last:.3f}* bits per byte{beside}."
    lowest = best_at.values[metric]
    if math.isfinite(last) and last <= lowest * 1.002:
        return [first]
    return [first, f"The best was {lowest:.3f} at step {best_at.step:,}."]


def _against(value: float, baselines: Mapping[str, float]) -> str:
    """How far below or above the baselines, as text."""
    comparisons = []
    for name, what in (("unigram", "single tokens"), ("bigram", "pairs of tokens")):
        level = baselines.get(name)
        if level:
            share = 100 * (1 - value / level)
            side = f"{abs(share):.0f} % {'below' if share >= 0 else 'above'}"
            comparisons.append(f"{side} the {level:.3f} of counting {what} ({name})")
    return ": " + " and ".join(comparisons) if comparisons else ""


def _best_tile(best: tuple[Evaluation, str] | None) -> Tile:
    if best is None:
        return Tile("Best validation", "–", "not measured")
    evaluation, metric = best
    unit = "bits per byte" if metric == "bits_per_byte" else "nats per token"
    return Tile(
        "Best validation",
        f"{evaluation.values[metric]:.3f}",
        f"{unit}, step\N{NO-BREAK SPACE}{evaluation.step:,}",
    )


def _per_step(history: RunHistory) -> str:
    finite = history.columns["tokens"][np.isfinite(history.columns["tokens"])]
    if len(finite) < 2 or finite[-1] <= finite[-2]:
        return ""
    return f"{show_count(float(finite[-1] - finite[-2]))} per step"


def _seconds_in_steps(history: RunHistory) -> float | None:
    tokens, speed = history.columns["tokens"], history.columns["tokens_per_s"]
    seconds = np.diff(tokens, prepend=0.0) / np.where(speed > 0, speed, np.nan)
    finite = seconds[np.isfinite(seconds)]
    return float(finite.sum()) if len(finite) else None


def _since_newest_start(history: RunHistory) -> list[RecordedEvent]:
    newest = history.of_kind("start", "attempt")
    return [e for e in history.events if not newest or e.start == newest[-1].start]


def _whole(count: int) -> str:
    return f"{count:,}" if count < 1_000_000 else show_count(count)
