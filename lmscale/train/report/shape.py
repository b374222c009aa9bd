"""Numbers for the charts: smoothing, thinning and limits. Pure functions over arrays.

Shapes: N steps, M points drawn.
"""

from typing import NamedTuple

import numpy as np


class AxisLimits(NamedTuple):
    """The visible range of a y axis, and how many values lie above it."""

    low: float
    high: float
    above: int


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
    known_N = np.isfinite(values_N)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known_N, values_N, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known_N)])
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
    once_M = np.isnan(low_M) | (low_M == high_M)  # one value in the bucket, or none: a single point
    return np.repeat(middle_M, 2 - once_M), _interleave(low_M, high_M, once_M)


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
    known_N = smooth_N[np.isfinite(smooth_N)]
    if len(known_N) < 100 or steps_N[0] < 1 or steps_N[-1] < 50 * steps_N[0]:
        return False
    drop = known_N[0] - known_N.min()
    early_drop = known_N[0] - known_N[: len(known_N) // 10].min()
    return bool(drop > 0 and early_drop >= 0.6 * drop)


def limits(values: np.ndarray, *, also: tuple[float, ...] = ()) -> AxisLimits:
    """A y range that shows the values without letting a few spikes flatten all others.

    Values far above the 99.5th percentile (by more than its distance from the minimum) are cut off
    and counted; `also` is always inside.
    """
    known = values[np.isfinite(values)]
    shown = [x for x in also if np.isfinite(x)]
    if not len(known):
        known = np.array(shown or [0.0, 1.0])
    bottom, usual = float(known.min()), float(np.quantile(known, 0.995))
    top = float(known.max())
    if top > usual + 1.0 * (usual - bottom) and len(known) >= 50:
        top = usual + 0.15 * (usual - bottom)
    bottom, top = min([bottom, *shown]), max([top, *shown])
    margin = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    return AxisLimits(bottom - margin, top + margin, int((known > top + margin).sum()))


def spread(positions: list[float], gap: float) -> list[float]:
    """Move labels apart until neighbours are `gap` away from each other, keeping their order."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    groups: list[tuple[float, list[int]]] = []  # (centre, members), members one gap apart
    for index in order:
        centre, members = positions[index], [index]
        while groups and groups[-1][0] + gap * (len(groups[-1][1]) + len(members)) / 2 > centre:
            before, others = groups.pop()
            weight = len(others) + len(members)
            centre = (before * len(others) + centre * len(members)) / weight
            members = others + members
        groups.append((centre, members))
    moved = list(positions)
    for centre, members in groups:
        for place, index in enumerate(members):
            moved[index] = centre + gap * (place - (len(members) - 1) / 2)
    return moved


def _bucket_starts(x_N: np.ndarray, buckets: int, *, log: bool) -> np.ndarray:
    place_N = np.log(x_N) if log else x_N.astype(np.float64)
    bucket_N = (place_N - place_N[0]) / (place_N[-1] - place_N[0]) * buckets
    bucket_N = np.minimum(bucket_N.astype(np.int64), buckets - 1)
    return np.flatnonzero(np.diff(bucket_N, prepend=-1))


def _interleave(low_M: np.ndarray, high_M: np.ndarray, once_M: np.ndarray) -> np.ndarray:
    both = np.stack([low_M, high_M], axis=1)
    keep = np.stack([np.ones_like(once_M), ~once_M], axis=1)
    return both[keep]
