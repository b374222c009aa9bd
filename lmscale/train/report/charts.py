"""The charts of a report: training curves drawn by matplotlib as SVG that is part of the page.

Text, axes and grid have the page's text colour (`currentColor`) and the curves have colours that
are readable on white and on dark paper, so one SVG serves light mode, dark mode and print. Long
curves are reduced to at most two points per drawn column, so a report of a million steps is small.

Shapes: N steps, M drawn points.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmscale.base.units import show_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, LOW, HALF = (920, 340), (920, 230), (448, 230)  # CSS pixels, the size at which they are shown

_TRAIN, _VALIDATION = "#2f6fed", "#d9591b"  # contrast of 4:1 on white and on the dark page
_TEXT = "#0a0b0c"  # replaced by currentColor in the SVG
_FONT = 13  # px on screen; about 7.5 pt on A4
_TICK_STEPS = (1, 2, 2.5, 5, 10)
_BUCKETS = 600  # drawn columns: about one for each 1.5 px of a wide chart
_BASELINES = {  # name -> line style, explanation
    "unigram": ((0, (7, 3)), "counting single tokens"),
    "bigram": ((0, (7, 2.5, 1.5, 2.5)), "counting pairs of tokens"),
}

Show = Callable[[float], str]  # formats a value for the axis


@dataclass(frozen=True, slots=True)
class Marks:
    """Steps of saves and restarts, shown on every chart."""

    saves: Sequence[int] = ()
    restarts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """The x axis and its marks, shared by the charts of a report."""

    first: int
    last: int
    log_x: bool
    marks: Marks


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart as an SVG element, and how many values lie above its visible range."""

    svg: str
    above: int = 0


@dataclass(frozen=True, slots=True)
class Series:
    """A quantity over steps, and the format of its axis."""

    title: str  # read out by screen readers
    steps: np.ndarray
    values: np.ndarray
    show: Show


class AxisLimits(NamedTuple):
    """The visible range of a y axis, and how many values lie above it."""

    low: float
    high: float
    above: int


def loss_chart(frame: Frame, loss: Series, validation: Sequence[tuple[int, float]]) -> Chart:
    """Raw and smoothed training loss, with validation points as (step, loss)."""
    figure, axes = _axes(frame, WIDE, loss.show, legend=True)
    above = _plot_raw_and_smooth(axes, frame, loss, also=tuple(value for _, value in validation))
    if validation:
        _plot_evaluations(axes, validation, label="validation", linewidth=1.0)
    _plot_marks(axes, frame)
    _add_legend(axes)
    return Chart(_svg(figure, loss.title), above)


def bits_chart(
    frame: Frame, title: str, points: Sequence[tuple[int, float]], baselines: dict[str, float]
) -> Chart:
    """Bits per byte of one corpus, with the n-gram baselines as reference lines."""
    figure, axes = _axes(frame, WIDE, lambda x: f"{x:g}", legend=True)
    y = limits(np.array([value for _, value in points]), also=tuple(baselines.values()))
    axes.set_ylim(y.low, y.high)
    last = f" {points[-1][1]:.3f}" if np.isfinite(points[-1][1]) else ""
    _plot_evaluations(axes, points, label=f"model{last}", linewidth=2.0)
    for name, level in baselines.items():
        style, explanation = _BASELINES[name]
        label = f"{name} {level:.3f} ({explanation})"
        axes.axhline(level, color=_TEXT, linewidth=1.3, linestyle=style, label=label)
    _plot_marks(axes, frame, label=False)
    _add_legend(axes)
    return Chart(_svg(figure, title), y.above)


def line_chart(frame: Frame, series: Series, *, size: tuple[int, int] = HALF) -> Chart:
    """One quantity that is exact at each step: the learning rate."""
    figure, axes = _axes(frame, size, series.show)
    y = limits(series.values, also=(0.0,))
    axes.set_ylim(0, y.high)
    x, values = sample(series.steps, series.values, buckets=_BUCKETS // 2, log=frame.log_x)
    axes.plot(x, values, color=_TRAIN, linewidth=2, marker=_marker(series), markersize=6)
    _plot_marks(axes, frame)
    return Chart(_svg(figure, series.title), y.above)


def noisy_chart(frame: Frame, series: Series, *, size: tuple[int, int] = HALF) -> Chart:
    """One quantity that varies from step to step: raw and smoothed, from zero up."""
    figure, axes = _axes(frame, size, series.show)
    above = _plot_raw_and_smooth(axes, frame, series, also=(0.0,))
    axes.set_ylim(bottom=0)
    _plot_marks(axes, frame)
    return Chart(_svg(figure, series.title), above)


def half_width(count: int) -> int:
    """How many neighbours on each side `smooth` averages over at most: 2 % of the run."""
    return count // 50


def smooth(values_N: np.ndarray) -> np.ndarray:
    """A centred mean over neighbours; NaN is left out, and NaN only where the whole window is.

    The window is 5 % of the steps so far on each side, at most 2 % of the run: the steep first
    steps stay as they are, on a logarithmic axis too. At the end it is cut, so it looks back only.
    """
    count = len(values_N)
    index_N = np.arange(count)
    half_N = np.minimum(index_N // 20, half_width(count))
    finite_N = np.isfinite(values_N)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite_N, values_N, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite_N)])
    low_N = np.maximum(index_N - half_N, 0)
    high_N = np.minimum(index_N + half_N + 1, count)
    in_window_N = counts[high_N] - counts[low_N]
    total_N = sums[high_N] - sums[low_N]
    return np.where(in_window_N > 0, total_N / np.maximum(in_window_N, 1), np.nan)


def thin(
    x_N: np.ndarray, y_N: np.ndarray, *, buckets: int, log: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 * buckets points with the same outline: minimum and maximum of each bucket of x.

    So a spike of one step in a million is still seen. x ascends; NaN is left out of a bucket.
    """
    if len(x_N) <= 2 * buckets:
        return x_N.astype(np.float64), y_N
    first_M = _bucket_starts(x_N, buckets, log=log)
    last_M = np.append(first_M[1:], len(x_N)) - 1
    low_M, high_M = np.fmin.reduceat(y_N, first_M), np.fmax.reduceat(y_N, first_M)
    middle_M = x_N[(first_M + last_M) // 2].astype(np.float64)
    single_M = np.isnan(low_M) | (low_M == high_M)  # at most one value per bucket: a single point
    return np.repeat(middle_M, 2 - single_M), _interleave(low_M, high_M, single_M)


def sample(
    x_N: np.ndarray, y_N: np.ndarray, *, buckets: int, log: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """At most buckets + 1 points of a line that is smooth anyway: one a bucket, and the last."""
    if len(x_N) <= buckets:
        return x_N.astype(np.float64), y_N
    kept_M = np.append(_bucket_starts(x_N, buckets, log=log), len(x_N) - 1)
    return x_N[kept_M].astype(np.float64), y_N[kept_M]


def wants_log_x(steps_N: np.ndarray, smooth_N: np.ndarray) -> bool:
    """Whether most of the drop comes early, so that on a linear axis the rest would look flat."""
    finite_N = smooth_N[np.isfinite(smooth_N)]
    if len(finite_N) < 100 or steps_N[0] < 1 or steps_N[-1] < 50 * steps_N[0]:
        return False
    drop = finite_N[0] - finite_N.min()
    early_drop = finite_N[0] - finite_N[: len(finite_N) // 10].min()
    return bool(drop > 0 and early_drop >= 0.6 * drop)


def limits(values: np.ndarray, *, also: tuple[float, ...] = ()) -> AxisLimits:
    """A y range that shows the values without letting a few spikes flatten all others.

    Values far above the 99.5th percentile (by more than its distance from the minimum) are cut off
    and counted; the values `also` are always visible.
    """
    finite = values[np.isfinite(values)]
    shown = [x for x in also if np.isfinite(x)]
    if not len(finite):
        finite = np.array(shown or [0.0, 1.0])
    bottom, usual = float(finite.min()), float(np.quantile(finite, 0.995))
    top = float(finite.max())
    if top > usual + 1.0 * (usual - bottom) and len(finite) >= 50:
        top = usual + 0.15 * (usual - bottom)
    bottom, top = min([bottom, *shown]), max([top, *shown])
    margin = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    return AxisLimits(bottom - margin, top + margin, int((finite > top + margin).sum()))


def _axes(
    frame: Frame, size: tuple[int, int], show: Show, *, legend: bool = False
) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    width, height = size
    figure = Figure(figsize=(width / 72, height / 72))  # an SVG point is one CSS pixel here
    left, right, bottom, top = 56, 16, 44, 40 if legend else 12
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_TEXT)
    axes.grid(axis="y", color=_TEXT, alpha=0.18, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(color=_TEXT, labelcolor=_TEXT, labelsize=_FONT)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.set_xlabel("step", color=_TEXT, fontsize=_FONT, labelpad=3)
    if frame.log_x:
        axes.set_xscale("log")
        axes.set_xlim(frame.first, frame.last * 1.03)
        axes.xaxis.set_minor_locator(NullLocator())
    elif frame.last == frame.first:
        axes.set_xlim(frame.first - 1, frame.last + 1)
        axes.set_xticks([frame.first])
    else:
        span = frame.last - frame.first
        axes.set_xlim(frame.first - 0.01 * span, frame.last + 0.015 * span)
        axes.xaxis.set_major_locator(MaxNLocator(width // 110, integer=True, steps=_TICK_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(height // 50, steps=_TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _show_step(x, frame.last)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: show(y)))
    return figure, axes


def _plot_raw_and_smooth(
    axes: "Axes", frame: Frame, series: Series, *, also: tuple[float, ...]
) -> int:
    """Draw the values and their moving mean; return how many values lie above the chart."""
    buckets = _BUCKETS if axes.bbox.width > axes.figure.dpi * HALF[0] / 72 else _BUCKETS // 2
    raw = thin(series.steps, series.values, buckets=buckets, log=frame.log_x)
    # The limits are those of the drawn points: on a logarithmic axis the first steps are wide.
    y = limits(raw[1], also=also)
    axes.set_ylim(y.low, y.high)
    mean = sample(series.steps, smooth(series.values), buckets=buckets, log=frame.log_x)
    axes.plot(
        *mean, color=_TRAIN, linewidth=2.2, zorder=5, marker=_marker(series), label="moving mean"
    )
    axes.plot(*raw, color=_TRAIN, alpha=0.5, linewidth=1, zorder=3, label="each step")
    return int((series.values > y.high).sum())


def _plot_evaluations(
    axes: "Axes", points: Sequence[tuple[int, float]], *, label: str, linewidth: float
) -> None:
    spacing = 0.02 if len(points) > 40 else None  # between markers, as a share of the diagonal
    axes.plot(
        *zip(*points, strict=True),
        color=_VALIDATION,
        marker="o",
        markersize=5.5,
        markevery=spacing,
        linewidth=linewidth,
        zorder=6,
        label=label,
    )


def _plot_marks(axes: "Axes", frame: Frame, *, label: bool = True) -> None:
    """Draw saves as ticks on the axis and restarts as dotted lines over the whole height."""
    restarts = [s for s in frame.marks.restarts if frame.first <= s <= frame.last]
    saves = np.array(frame.marks.saves, np.float64)
    if len(saves) > _BUCKETS:  # closer than the eye can separate
        saves = saves[:: -(-len(saves) // _BUCKETS)]
    if len(saves):
        axes.plot(
            saves,
            np.full(len(saves), 0.018),
            transform=axes.get_xaxis_transform(),  # x in steps, y as a share of the height
            color=_TEXT,
            marker="|",
            markersize=9,
            linestyle="none",
            zorder=2,
            label="checkpoint" if label else None,
        )
    for index, step in enumerate(restarts):
        name = "restart" if label and index == 0 else None
        axes.axvline(step, color=_TEXT, linewidth=1, linestyle=(0, (1.5, 2.5)), label=name)


def _add_legend(axes: "Axes") -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=6,
        frameon=False,
        labelcolor=_TEXT,
        fontsize=_FONT,
        borderpad=0.2,
        borderaxespad=0,
        columnspacing=1.6,
    )


def _marker(series: Series) -> str:
    return "o" if len(series.steps) == 1 else ""


def _show_step(step: float, last: int) -> str:
    return f"{step:,.0f}" if last < 100_000 else show_count(step)


def _svg(figure: "Figure", title: str) -> str:
    """The figure as an SVG element with text as text and without ids that other charts have."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_TEXT, "currentColor")
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).strip()


def _bucket_starts(x_N: np.ndarray, buckets: int, *, log: bool) -> np.ndarray:
    place_N = np.log(x_N) if log else x_N.astype(np.float64)
    bucket_N = (place_N - place_N[0]) / (place_N[-1] - place_N[0]) * buckets
    bucket_N = np.minimum(bucket_N.astype(np.int64), buckets - 1)
    return np.flatnonzero(np.diff(bucket_N, prepend=-1))


def _interleave(low_M: np.ndarray, high_M: np.ndarray, single_M: np.ndarray) -> np.ndarray:
    both = np.stack([low_M, high_M], axis=1)
    keep = np.stack([np.ones_like(single_M), ~single_M], axis=1)
    return both[keep]
