"""What may be said of two series of times that were taken in the same rounds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contenders import Bar


@dataclass(frozen=True)
class Ratio:
    """Speed: the peer's time over one's own, of each round. More than 1: faster than the peer."""

    median: float
    low: float  # the middle half of the rounds lies between low and high
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def ratio(own: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Of paired rounds: a slow minute of the machine is in both of its times."""
    speeds = sorted(theirs / mine for mine, theirs in zip(own, peer, strict=True))
    quarter = len(speeds) // 4
    return Ratio(statistics.median(speeds), speeds[quarter], speeds[-1 - quarter])


def noise(null: Ratio) -> float:
    """How far from 1 a loop is from itself: differences up to this are not claimed."""
    return max(abs(value - 1) for value in (null.median, null.low, null.high))


def claim(found: Ratio, noise: float) -> str:
    """In words; a difference must exceed the noise, and have the same sign in half of the rounds."""
    if abs(found.median - 1) <= noise or found.low <= 1 <= found.high:
        return "none"
    percent = abs(found.median - 1) * 100
    return f"{percent:.0f} % {'faster' if found.median > 1 else 'slower'}"


def verdict(found: Ratio, bar: Bar, noise: float) -> str:
    """Of a bar: met, missed, or missed by less than the noise."""
    if found.median >= bar.least:
        return "met"
    return "missed" if found.median < bar.least - noise else "missed, within the noise"


def disagreement(
    found: Mapping[str, Sequence[float | None]], want: Mapping[str, Sequence[float | None]]
) -> tuple[float, float]:
    """Largest difference of losses, in nats, and of gradient norms, relative; a missing norm counts nothing."""
    losses = [abs(a - b) for a, b in _pairs(found["losses"], want["losses"])]
    norms = [abs(a / b - 1) for a, b in _pairs(found["norms"], want["norms"])]
    return max(losses), max(norms, default=0.0)


def _pairs(
    found: Sequence[float | None], want: Sequence[float | None]
) -> list[tuple[float, float]]:
    pairs = zip(found, want, strict=True)
    return [(a, b) for a, b in pairs if a is not None and b is not None]
