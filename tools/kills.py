"""What one trial of the soak does: which engine, whom it kills, how often and when. Pure: a seed and a number say all.

step      when metrics.jsonl has a random line
save      when a checkpoint's .tmp folder appears after a random step
start-up  a random share of the time to the first step after the victim exists
finish    after the last step's line: validation, the last checkpoint, the report
"""

import random
from dataclasses import dataclass

ENGINES = ("fsdp", "ddp", "zero2")
VICTIMS = (
    "rank",  # one, and the run ends
    "rank, restarted in place",  # one, and the supervisor starts all again (cluster.max_restarts)
    "supervisor",
    "all",
)
IN_PLACE = VICTIMS[1]
MOMENTS = ("step", "save", "start-up", "finish")
_MOMENT_WEIGHTS = (4, 3, 2, 1)
_KILLS_WEIGHTS = (5, 2, 1)  # of one, two and three kills in a row
_MORE_S = 0.03  # a save of a small model takes about this long: the kill falls anywhere in it


@dataclass(frozen=True)
class Kill:
    """One SIGKILL, in words that do not depend on how fast the machine is."""

    moment: str
    share: float  # step, save: of the steps that are left; start-up, finish: of the usual time
    pause_s: float  # after the moment

    def at_step(self, first: int, last: int) -> int:
        """The step to wait for, in first..last; beyond them there is nothing left to do."""
        return min(last, first + int(self.share * (last - first + 1)))


@dataclass(frozen=True)
class Trial:
    """The kills before the run may finish."""

    number: int
    engine: str
    victim: str
    kills: tuple[Kill, ...]
    chooser: int  # seeds the choice of the rank


def plan_trial(seed: int, number: int) -> Trial:
    """Trial `number` (from 0) of a seed. Engines and victims take turns; the rest is drawn."""
    chooser = random.Random(f"{seed}:{number}")
    (count,) = chooser.choices(range(1, len(_KILLS_WEIGHTS) + 1), _KILLS_WEIGHTS)
    return Trial(
        number=number,
        engine=ENGINES[number % len(ENGINES)],
        victim=VICTIMS[number // len(ENGINES) % len(VICTIMS)],
        kills=tuple(_kill(chooser) for _ in range(count)),
        chooser=chooser.randrange(2**32),
    )


def _kill(chooser: random.Random) -> Kill:
    (moment,) = chooser.choices(MOMENTS, _MOMENT_WEIGHTS)
    pause_s = chooser.random() * _MORE_S if moment in ("step", "save") else 0.0
    return Kill(moment, chooser.random(), pause_s)


def in_words(trial: Trial) -> str:
    """One line for people."""
    return f"{trial.engine}, kill {trial.victim}: {', then '.join(k.moment for k in trial.kills)}"
