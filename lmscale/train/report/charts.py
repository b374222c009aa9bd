"""The charts of a report: matplotlib figures turned into SVG that lives inside a page.

Text stays text in the page's own font, and colours are the page's variables (a figure is drawn with
a placeholder colour for each), so charts follow light, dark and print without being drawn again.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from lmscale.base.units import show_count
from lmscale.train.report.shape import limits, sample, smooth, spread, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, LOW, HALF = (920, 330), (920, 230), (448, 230)  # CSS pixels, the size at which they are shown

# placeholder -> variable of the page's style sheet
_INK, _MUTED, _GRID, _TRAIN, _RAW, _VALID, _PAPER = (f"#0a0b0{n}" for n in range(7))
_VARIABLES = dict(
    zip(
        (_INK, _MUTED, _GRID, _TRAIN, _RAW, _VALID, _PAPER),
        ("ink", "muted", "grid", "train", "raw", "valid", "paper"),
        strict=True,
    )
)
Show = Callable[[float], str]  # a value as the axis writes it

_FONT = 13  # px on screen; about 7.5 pt on A4
_ROUND = (1, 2, 2.5, 5, 10)  # steps between ticks
_BUCKETS = 600  # drawn columns: about one for each 1.5 px of a wide chart
_DASHES = {"unigram": (0, (7, 3)), "bigram": (0, (7, 2.5, 1.5, 2.5))}


@dataclass(frozen=True, slots=True)
class Marks:
    """Steps at which something happened, shown on every chart."""

    saves: Sequence[int] = ()
    restarts: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """What all charts of a report share: the x axis and the marks on it."""

    first: int
    last: int
    log_x: bool
    marks: Marks


@dataclass(frozen=True, slots=True)
class Drawn:
    """A chart for the page, and how many values lie above its visible range."""

    svg: str
    above: int = 0


@dataclass(frozen=True, slots=True)
class Series:
    """A quantity over steps, and how its axis reads."""

    title: str  # for readers who hear the page
    steps: np.ndarray
    values: np.ndarray
    show: Show


def loss_chart(frame: Frame, loss: Series, validation: Sequence[tuple[int, float]]) -> Drawn:
    """Raw and smoothed training loss, with validation points."""
    figure, axes = _axes(frame, WIDE, loss.show)
    smooth_N = smooth(loss.values)
    points = [value for _, value in validation]
    above = _raw_and_smooth(axes, frame, loss, smooth_N, also=tuple(points))
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            color=_VALID,
            marker="o",
            markersize=5.5,
            markeredgecolor=_PAPER,
            markeredgewidth=1.2,
            markevery=_thin_markers(validation),
            linewidth=0.9,
            zorder=6,
        )
    _draw_marks(axes, frame, labels=True)
    return Drawn(_svg(figure, loss.title), above)


def bits_chart(
    frame: Frame, title: str, points: Sequence[tuple[int, float]], baselines: dict[str, float]
) -> Drawn:
    """Bits per byte of one corpus, with what counting tokens reaches as reference lines."""
    figure, axes = _axes(frame, WIDE, lambda x: f"{x:g}", right=118)
    levels = tuple(baselines.values())
    y = limits(np.array([value for _, value in points]), also=levels)
    axes.set_ylim(y.low, y.high)
    for name, level in baselines.items():
        axes.axhline(level, color=_MUTED, linewidth=1.3, linestyle=_DASHES.get(name, "dotted"))
    axes.plot(
        *zip(*points, strict=True),
        color=_VALID,
        marker="o",
        markersize=5.5,
        markeredgecolor=_PAPER,
        markeredgewidth=1.2,
        markevery=_thin_markers(points),
        linewidth=2,
        zorder=6,
    )
    labels = [(f"{name} {level:.3f}", level, _MUTED) for name, level in baselines.items()]
    if np.isfinite(points[-1][1]):
        labels.append((f"model {points[-1][1]:.3f}", points[-1][1], _VALID))
    _label_right(axes, labels)
    _draw_marks(axes, frame, labels=True)
    return Drawn(_svg(figure, title), y.above)


def line_chart(frame: Frame, series: Series, *, size: tuple[int, int] = HALF) -> Drawn:
    """One quantity that is exact at each step: the learning rate."""
    figure, axes = _axes(frame, size, series.show)
    y = limits(series.values, also=(0.0,))
    axes.set_ylim(0, y.high)
    x, values = sample(series.steps, series.values, buckets=_BUCKETS // 2, log=frame.log_x)
    axes.plot(x, values, color=_TRAIN, linewidth=2, marker=_dot_if_single(series), markersize=6)
    _draw_marks(axes, frame)
    return Drawn(_svg(figure, series.title), y.above)


def noisy_chart(frame: Frame, series: Series, *, size: tuple[int, int] = HALF) -> Drawn:
    """One quantity that jumps from step to step: raw and smoothed, from zero up."""
    figure, axes = _axes(frame, size, series.show)
    above = _raw_and_smooth(axes, frame, series, smooth(series.values), also=(0.0,))
    axes.set_ylim(bottom=0)
    _draw_marks(axes, frame)
    return Drawn(_svg(figure, series.title), above)


def _axes(
    frame: Frame, size: tuple[int, int], show: Show, *, right: int = 16
) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    width, height = size
    figure = Figure(figsize=(width / 72, height / 72))  # an SVG point is one CSS pixel here
    left, bottom, top = 56, 44, 22
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=_MUTED, linewidth=1)
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", color=_MUTED, labelcolor=_MUTED, labelsize=_FONT, length=4)
    axes.tick_params(axis="y", length=0, labelcolor=_MUTED, labelsize=_FONT, pad=6)
    axes.set_xlabel("step", color=_MUTED, fontsize=_FONT, labelpad=3)
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
        axes.xaxis.set_major_locator(MaxNLocator(width // 110, integer=True, steps=_ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(height // 50, steps=_ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _show_step(x, frame.last)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: show(y)))
    return figure, axes


def _raw_and_smooth(
    axes: "Axes", frame: Frame, series: Series, smooth_N: np.ndarray, *, also: tuple[float, ...]
) -> int:
    buckets = round(_BUCKETS * axes.get_window_extent().width / WIDE[0] * 72 / axes.figure.dpi)
    raw = thin(series.steps, series.values, buckets=buckets, log=frame.log_x)
    y = limits(
        raw[1], also=also
    )  # of what is drawn: on a logarithmic axis the first steps are wide
    axes.set_ylim(y.low, y.high)
    even = sample(series.steps, smooth_N, buckets=buckets, log=frame.log_x)
    axes.plot(*raw, color=_RAW, linewidth=1, zorder=3)
    axes.plot(
        *even, color=_TRAIN, linewidth=2.2, zorder=5, marker=_dot_if_single(series), markersize=6
    )
    return int((series.values > y.high).sum())


def _draw_marks(axes: "Axes", frame: Frame, *, labels: bool = False) -> None:
    """Saves as short ticks that rise from the axis, restarts as thin lines over all the height."""
    inside = [s for s in frame.marks.restarts if frame.first <= s <= frame.last]
    saves = np.array(frame.marks.saves, np.float64)
    if len(saves) > _BUCKETS:  # closer than the eye can tell apart
        saves = saves[:: -(-len(saves) // _BUCKETS)]
    across = axes.get_xaxis_transform()  # x in steps, y as a share of the height
    axes.vlines(saves, 0, 0.035, transform=across, color=_MUTED, linewidth=1, zorder=2)
    axes.vlines(inside, 0, 1, transform=across, color=_INK, linewidth=1, linestyle=(0, (1.5, 2.5)))
    if labels and 0 < len(inside) <= 8:
        for step in inside:
            axes.text(
                step,
                1.02,
                "restart",
                transform=across,
                color=_MUTED,
                fontsize=_FONT - 1,
                ha="center",
            )


def _label_right(axes: "Axes", labels: list[tuple[str, float, str]]) -> None:
    to_pixels, height = axes.transData, axes.bbox.height
    bottom = axes.bbox.y0
    places = [(to_pixels.transform((1, value))[1] - bottom) for _, value, _ in labels]
    scale = axes.figure.dpi / 72
    for (text, _, color), place in zip(labels, spread(places, 17 * scale), strict=True):
        axes.text(
            1.012,
            place / height,
            text,
            transform=axes.transAxes,
            va="center",
            color=color,
            fontsize=_FONT,
            fontweight="bold" if color == _VALID else "normal",
        )


def _dot_if_single(series: Series) -> str:
    return "o" if len(series.steps) == 1 else ""


def _thin_markers(points: Sequence[tuple[int, float]]) -> float | None:
    """Every point; of many, points some distance apart (a share of the diagonal)."""
    return 0.02 if len(points) > 40 else None


def _show_step(step: float, last: int) -> str:
    return f"{step:,.0f}" if last < 100_000 else show_count(step)


def _svg(figure: "Figure", title: str) -> str:
    """The figure as an SVG element: no ids that clash, no font and no colour of its own."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(out, metadata=metadata)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    text = re.sub(r"[ \t]*\n[ \t]*", " ", text)
    for placeholder, name in _VARIABLES.items():
        text = text.replace(placeholder, f"var(--{name})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).strip()
