"""One line that says how the run is going: in place on a terminal, now and then in a log file."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TextIO

from lmscale.base.console import StatusLine
from lmscale.base.units import show_count, show_seconds

_GAP = "  "
_WINDOW = (
    100  # updates behind the time left: some hold an evaluation or a save, which take time too
)


@dataclass(frozen=True, slots=True)
class ProgressState:
    """What the line shows; None is left out."""

    step: int
    total: int
    loss: float
    tokens_per_s: float | None = None
    mfu: float | None = None  # between 0 and 1
    left_s: float | None = None
    saved_step: int | None = None  # newest checkpoint


def progress_line(now: ProgressState, width: int | None = None) -> str:
    """The line as text. Where it is wider than `width`, the least telling parts go first."""
    share = now.step / now.total if now.total else 1.0
    parts = {
        "step": f"step {now.step:,}/{now.total:,}",
        "share": f"{math.floor(100 * share)}%",
        "loss": f"loss {now.loss:.4f}" if math.isfinite(now.loss) else f"loss {now.loss}",
        "speed": _known(now.tokens_per_s, lambda x: f"{show_count(x)} tok/s"),
        "mfu": _known(now.mfu, lambda x: f"MFU {100 * x:.1f}%"),
        "left": _known(now.left_s, lambda x: f"ETA {show_seconds(x)}"),
        "saved": _known(now.saved_step, lambda x: f"saved {x:,}"),
    }
    parts = {name: text for name, text in parts.items() if text}
    for least_telling in ("saved", "mfu", "share", "speed", "left", "step"):
        if width is None or len(_GAP.join(parts.values())) <= width:
            break
        parts.pop(least_telling, None)
    line = _GAP.join(parts.values())
    return line if width is None else line[:width]


class ProgressLine:
    """Rank 0's progress line: in place on a terminal, else a line every `every_steps` steps (log.every_steps).

    On a terminal, log lines of other modules would land behind it: add `makes_room` as a filter to
    the handler that writes them, and the line is erased first.
    """

    def __init__(
        self,
        stream: TextIO,
        total: int,
        *,
        every_steps: int = 10,
        saved_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self._clock = clock
        self._line = StatusLine(
            stream, log=lambda text: _write_line(stream, text), log_s=0.0, clock=clock
        )
        self._every_steps = every_steps
        self._saved_step = saved_step
        self._seen: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._latest: ProgressState | None = None  # not yet written
        self._first = True

    def update(
        self, step: int, loss: float, tokens_per_s: float | None = None, mfu: float | None = None
    ) -> None:
        """After each step; writes only when it is time, so it costs next to nothing."""
        now = self._clock()
        self._seen.append((now, step))
        speed = tokens_per_s if tokens_per_s is not None and math.isfinite(tokens_per_s) else None
        known_mfu = mfu if mfu is not None and math.isfinite(mfu) else None
        self._latest = ProgressState(
            step, self.total, loss, speed, known_mfu, self._left_s(), self._saved_step
        )
        due = self._line.due() if self._line.in_place else step % self._every_steps == 0
        if due or self._first:
            self._write()

    def saved(self, step: int) -> None:
        """A checkpoint of this step stands."""
        self._saved_step = step
        if self._latest is not None:
            self._latest = replace(self._latest, saved_step=step)

    def close(self) -> None:
        """Write the newest state and leave the cursor on a fresh line."""
        if self._latest is not None:
            self._write()
        self._line.finish()

    def makes_room(self, record: logging.LogRecord) -> bool:
        """A logging filter that lets every record pass and erases the line before it is written."""
        return self._line.clears_for(record)

    def _left_s(self) -> float | None:
        (first_at, first), (last_at, last) = self._seen[0], self._seen[-1]
        if last <= first:
            return None
        return (last_at - first_at) / (last - first) * max(self.total - last, 0)

    def _write(self) -> None:
        assert self._latest is not None
        self._line.show(progress_line(self._latest, self._line.width))
        self._latest, self._first = None, False


def _write_line(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


def _known(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)
