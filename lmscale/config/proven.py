"""Is this combination proven to compute the gradients of one process? Asked of the table that the matrix wrote.

proven.json stands beside this file: the cases that passed, and what is refused with its reason. A run is proven
when every three of its factors occurred together in a case; what one process computes wrongly only in the company
of others is then found with two others present. Its open factors (factors.OPEN) count with each of their values.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from lmscale.config.factors import FACTORS, KEYS, OPEN, STYLES, clash, factors
from lmscale.config.nearest import MODEL, nearest
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, Problem

PATH = Path(__file__).with_name("proven.json")
READS = (*(key for keys in KEYS.values() for key in keys), "parallel.shard")

Words = Mapping[str, str]
Point = tuple[str, str]  # a factor and its value
Triple = tuple[Point, ...]  # three factors, each with its value

# TP 8 needs all ranks of the largest tested world, so it is run once an engine; with other factors it counts
# as the largest size that all of them were crossed with.
_COUNTS_AS = {("tp", "8"): (("tp", "8"), ("tp", "4"))}


@dataclass(frozen=True, slots=True)
class Refused:
    """A combination that is known not to work."""

    factors: Words
    why: str
    nearest: str


class Table:
    """The proven cases, each a bit: a combination occurred where the masks of its values share one."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """`document`: what proven.json holds. Raises KeyError for a case that lacks a factor."""
        self._masks: dict[Point, int] = {}
        for index, case in enumerate(document["cases"]):
            for factor in (*FACTORS, *OPEN):
                point = (factor, case[factor])
                self._masks[point] = self._masks.get(point, 0) | 1 << index
        self._refused = tuple(
            Refused(entry["factors"], entry["why"], entry["nearest"])
            for entry in document["refused"]
        )

    @classmethod
    def read(cls, path: Path = PATH) -> "Table":
        """Raises ConfigError where the file is missing or is no such table."""
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fact = f"the table of proven combinations cannot be read: {path}: {error!r}"
            hint = "it is a part of lmscale that this installation lacks: install lmscale again"
            raise ConfigError([Problem("", fact, hint)]) from error

    def refused(self, words: Words) -> list[Refused]:
        """The entries that this combination matches."""
        return [
            entry
            for entry in self._refused
            if all(self._matches(point, words) for point in entry.factors.items())
        ]

    def missing(self, words: Words) -> Iterator[Triple]:
        """Three factors of this combination that no case had together; open ones come last."""
        points = [(point, self._mask(point)) for point in words.items()]
        points += [((f, value), self._mask((f, value))) for f in OPEN for value in OPEN[f]]
        for (a, in_a), (b, in_b), (c, in_c) in combinations(points, 3):
            if not in_a & in_b & in_c:
                words = dict((a, b, c))
                if len(words) == 3 and clash(words) is None:
                    yield a, b, c

    def proves(self, words: Words) -> bool:
        """Whether they can stand together, every three of them were run, and nothing is refused."""
        possible = clash(words) is None and not self.refused(words)
        return possible and next(self.missing(words), None) is None

    @staticmethod
    def _matches(point: Point, words: Words) -> bool:
        factor, _ = point
        return factor in OPEN or point in _counts_as((factor, words[factor]))

    def _mask(self, point: Point) -> int:
        mask = 0
        for one in _counts_as(point):
            mask |= self._masks.get(one, 0)
        return mask


def unproven(cfg: RunConfig) -> Iterator[Problem]:
    """What of this run the table that lmscale comes with does not prove. Raises ConfigError where that is missing."""
    yield from problems(cfg, Table.read())


def problems(cfg: RunConfig, table: Table) -> Iterator[Problem]:
    """What of this run is refused or not proven, with the nearest setting that is proven.

    Nothing of what cannot be at all (`factors.clash`): other checks say so.
    """
    words = factors(cfg)
    if clash(words) is not None:
        return
    refused = table.refused(words)
    missing = [] if refused else list(table.missing(words))
    if not refused and not missing:
        return
    found = nearest(words, table.proves)
    for entry in refused:
        path = _path(entry.factors, found)
        fact = f"{_named(entry.factors, cfg)} is refused: {entry.why}"
        yield Problem(path, fact, _hint(found, cfg) or entry.nearest or _NO_CURE)
    if missing:
        changed = found or {}
        triple = dict(max(missing, key=lambda it: sum(factor in changed for factor, _ in it)))
        fact = f"{_named(triple, cfg)} is not proven to give the gradients of one process"
        yield Problem(_path(triple, found), fact, _hint(found, cfg) or _NO_CURE)


def _counts_as(point: Point) -> tuple[Point, ...]:
    return _COUNTS_AS.get(point, (point,))


def _path(named: Words, found: Mapping[str, str] | None) -> str:
    """The key to change: of the factors that are named, one that the cure changes."""
    known = [factor for factor in named if factor in KEYS]
    changed = [factor for factor in known if factor in (found or {})]
    return KEYS[(changed or known)[0]][0]


_NO_CURE = "no setting near this one is proven; docs/gradients.md lists what is"


def _hint(found: Mapping[str, str] | None, cfg: RunConfig) -> str:
    if found is None:
        return ""
    settings = " ".join(_setting(factor, value, cfg) for factor, value in found.items())
    if any(factor in MODEL for factor in found):
        return f"no setting for this model is proven; the nearest that is: {settings}"
    return f"the nearest proven setting: {settings}"


def _setting(factor: str, value: str, cfg: RunConfig) -> str:
    """The value of a factor as overrides that change this run."""
    key = KEYS[factor][0]
    match factor:
        case "engine":
            return _engine(value, cfg)
        case "style":
            parts = STYLES[value].items()
            return " ".join(f"model.{k}={_text(v)}" for k, v in parts if getattr(cfg.model, k) != v)
        case "dropout":
            return f"{key}=0"
        case "recompute":
            return f"{key}={'every:2' if value == 'every' else value}"
    return f"{key}={_text({'on': True, 'off': False}.get(value, value))}"


def _engine(value: str, cfg: RunConfig) -> str:
    """Of keys that only one engine reads, those that are set go back to their defaults."""
    zero = value.startswith("zero")
    wanted = {
        "engine.kind": "deepspeed" if zero else value,
        "engine.zero_stage": int(value[-1]) if zero else 2,
        "parallel.replicate": 1,
        "parallel.shard": cfg.parallel.shard if value == "fsdp" else "auto",
    }
    now = {
        "engine.kind": cfg.engine.kind,
        "engine.zero_stage": cfg.engine.zero_stage,
        "parallel.replicate": cfg.parallel.replicate,
        "parallel.shard": cfg.parallel.shard,
    }
    if cfg.parallel.replicate > 1:
        wanted["parallel.shard"] = "auto"
    return " ".join(f"{key}={new}" for key, new in wanted.items() if new != now[key])


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_OPEN_WORDS = {
    ("accumulation", "1"): "one micro-batch a step",
    ("accumulation", "3"): "several micro-batches a step",
    ("targets", "equal"): "as many targets on each rank",
    ("targets", "unequal"): "unequal numbers of targets on the ranks",
    ("world", "smallest"): "the fewest ranks",
    ("world", "largest"): "many ranks",
}


def _named(words: Words, cfg: RunConfig) -> str:
    """Factors as a user would call them: the keys with their values in this run."""
    parts = []
    for factor, value in words.items():
        if factor in OPEN:
            parts.append(_OPEN_WORDS[factor, value])
            continue
        for key in _telling(factor, cfg):
            section, _, name = key.partition(".")
            parts.append(f"{key}={_text(getattr(getattr(cfg, section), name))}")
    return f"{', '.join(parts[:-1])} with {parts[-1]}" if len(parts) > 1 else parts[0]


def _telling(factor: str, cfg: RunConfig) -> tuple[str, ...]:
    """The keys that make a factor what it is in this run."""
    kind, stage, replicate = KEYS["engine"]
    if factor != "engine":
        return KEYS[factor]
    if cfg.engine.kind == "deepspeed":
        return kind, stage
    return (kind, replicate) if cfg.parallel.replicate > 1 else (kind,)
