"""Progress of a rank, shared with its supervisor through memory that both map.

The supervisor makes two unnamed files in memory per rank (memfd: nothing in /dev/shm, nothing left
behind) and the rank inherits them: into one it writes its step and phase, into the other its stack on
SIGQUIT. A tick is one pwrite, about a microsecond.
"""

import faulthandler
import os
import signal
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

PULSE_FD, STACK_FD = "LMSCALE_PULSE_FD", "LMSCALE_STACK_FD"

Phase = Literal["start", "load", "data", "step", "eval", "save", "finish"]
# In the order in which a rank goes through them within one step.
PHASES: tuple[Phase, ...] = ("start", "load", "data", "step", "eval", "save", "finish")
STEPPING = ("data", "step")

_LAYOUT = struct.Struct("=qqqqd")
_NAMES = {PULSE_FD: "lmscale-pulse", STACK_FD: "lmscale-stack"}
_STACK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ProgressReading:
    """The last report of a rank."""

    count: int = 0  # of ticks; any change means progress
    step: int = 0  # at work on this one
    phase: Phase = "start"
    warm: bool = False  # its first step is done
    longest_s: float = 0.0  # between two ticks while it was stepping

    @property
    def steps_done(self) -> int | None:
        """Optimizer steps of the run that are done; None before this start has begun its first."""
        if self.step == 0:
            return None
        return self.step - 1 if self.phase in STEPPING else self.step


class RankProgress:
    """The rank's side. Without a supervisor a tick costs next to nothing."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self._last = ProgressReading()
        self._at = time.monotonic()
        self.observer: Callable[[], None] | None = None  # called after each tick

    @property
    def is_shared(self) -> bool:
        """Whether a supervisor reads it."""
        return self._descriptor is not None

    @property
    def reading(self) -> ProgressReading:
        """What the supervisor would read now."""
        return self._last

    @classmethod
    def inherited(cls, env: Mapping[str, str]) -> Self:
        """From the descriptors that the environment names; from now on SIGQUIT writes the stack."""
        stack = _inherited(env, STACK_FD)
        if stack is not None:
            faulthandler.register(signal.SIGQUIT, file=stack, all_threads=True, chain=False)
        return cls(_inherited(env, PULSE_FD))

    def tick(self, phase: Phase, step: int | None = None) -> None:
        """Report progress: the rank is now in this phase of this step."""
        last, now = self._last, time.monotonic()
        gap_s, self._at = now - self._at, now
        stepped = last.phase in STEPPING
        # The first step compiles, allocates and connects: its time says nothing about the others.
        longest_s = max(last.longest_s, gap_s) if stepped and last.warm else last.longest_s
        warm = last.warm or (last.phase == "step" and (phase != "step" or step != last.step))
        step = last.step if step is None else step
        self._last = ProgressReading(last.count + 1, step, phase, warm, longest_s)
        if self._descriptor is not None:
            os.pwrite(self._descriptor, _packed(self._last), 0)
        if self.observer is not None:
            self.observer()


def new_descriptors() -> dict[str, int]:
    """The supervisor's side: one descriptor per variable, to be inherited. Empty where the kernel has no memfd."""
    try:
        return {name: os.memfd_create(label) for name, label in _NAMES.items()}
    except (AttributeError, OSError):
        return {}


def read_beat(descriptor: int) -> ProgressReading:
    """The last report of the rank. A read beside a write could be torn, so it counts when it repeats."""
    data = b""
    for _ in range(4):
        before, data = data, os.pread(descriptor, _LAYOUT.size, 0)
        if data == before:
            break
    if len(data) < _LAYOUT.size:
        return ProgressReading()
    count, step, phase, warm, longest_s = _LAYOUT.unpack(data)
    return ProgressReading(count, step, PHASES[min(phase, len(PHASES) - 1)], bool(warm), longest_s)


def read_stack(descriptor: int) -> str:
    """What faulthandler has written; empty until it has."""
    return os.pread(descriptor, _STACK_BYTES, 0).decode(errors="replace")


def _packed(beat: ProgressReading) -> bytes:
    phase = PHASES.index(beat.phase)
    return _LAYOUT.pack(beat.count, beat.step, phase, beat.warm, beat.longest_s)


def _inherited(env: Mapping[str, str], name: str) -> int | None:
    """The descriptor that the variable names; in a child of a rank it may be another file's: then None."""
    text = env.get(name, "")
    if not text.isdecimal():
        return None
    try:
        target = os.readlink(f"/proc/self/fd/{text}")
    except OSError:
        return None
    return int(text) if target.startswith(f"/memfd:{_NAMES[name]}") else None
