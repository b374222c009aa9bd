"""The factors of a run: the few words by which the table of proven combinations knows it. Pure, no torch.

The differential matrix (tools/gradient_matrix.py) runs combinations of these words against one process; proven.py
asks whether the words of a run were among them.

The nearest combination of factors that is proven: a search over a few changes, the mildest first.

Is this combination proven to compute the gradients of one process? Asked of the table that the matrix wrote.

proven.json stands beside this file: the cases that passed, and what is refused with its reason. A run is proven
when every three of its factors occurred together in a case; what one process computes wrongly only in the company
of others is then found with two others present. Its open factors (factors.OPEN) count with each of their values.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from lmscale.base.errors import ConfigError, Problem
from lmscale.config.engine_kinds import ENGINE_KINDS, EngineKind
from lmscale.config.schema import ModelConfig, RunConfig

# The engines as the gradient tests name them, with their rows.
_ENGINES: Mapping[str, EngineKind] = {
    name: row for row in ENGINE_KINDS.values() for name in (row.gradient_factors or (row.name,))
}
# What a run file decides.
FACTORS: Mapping[str, tuple[str, ...]] = {
    "engine": tuple(sorted(_ENGINES)),
    "tp": ("1", "2", "4", "8"),
    "sequence_parallel": ("off", "on"),
    "recompute": ("none", "full", "selective", "every", "budget"),
    "documents": ("separate", "joined"),
    "precision": ("fp32", "bf16", "fp64", "fp16"),
    "style": ("llama", "gpt2", "mixed"),
    "dropout": ("off", "on"),
    "offload": ("none", "optimizer", "all", "nvme"),
    "compile": ("off", "on"),
    "reshard": ("on", "off"),
}
# What a run leaves open, because a restart may change it: each value of these must be proven.
OPEN: Mapping[str, tuple[str, ...]] = {
    "accumulation": ("1", "3"),  # micro-batches of a step; the last of three is short
    "targets": ("equal", "unequal"),  # over the data-parallel ranks
    "world": ("smallest", "largest"),  # legal number of ranks among 1, 2, 4, 8
}
# The keys that decide a factor, the first of them the one to name.
KEYS: Mapping[str, tuple[str, ...]] = {
    "engine": ("engine.kind", "engine.zero_stage", "parallel.dp_replicate"),
    "tp": ("parallel.tp",),
    "sequence_parallel": ("parallel.sequence_parallel",),
    "recompute": ("engine.activation_checkpointing",),
    "documents": ("data.documents",),
    "precision": ("engine.precision",),
    "style": (
        *("model.norm", "model.norm_order", "model.positions"),
        *("model.activation", "model.bias", "model.tie_embeddings"),
    ),
    "dropout": ("model.dropout",),
    "offload": ("engine.offload",),
    "compile": ("engine.compile",),
    "reshard": ("engine.reshard_after_forward",),
}
STYLES: Mapping[str, Mapping[str, object]] = {
    "llama": {
        "norm": "rms",
        "norm_order": "pre",
        "positions": "rotary",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    },
    "gpt2": {
        "norm": "layer",
        "norm_order": "pre",
        "positions": "learned",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
}
_LARGEST_TP = 8


def factors(cfg: RunConfig) -> dict[str, str]:
    """The words of a run: one of FACTORS for each. A tp above the tested sizes counts as the largest of them."""
    engine, parallel = cfg.engine, cfg.parallel
    return {
        "engine": _engine(cfg),
        "tp": str(min(parallel.tp, _LARGEST_TP)),
        "sequence_parallel": _on(parallel.sequence_parallel),
        "recompute": engine.activation_checkpointing.partition(":")[0],
        "documents": cfg.data.documents,
        "precision": engine.precision,
        "style": style(cfg.model),
        "dropout": _on(cfg.model.dropout > 0),
        "offload": engine.offload,
        "compile": _on(engine.compile),
        "reshard": _on(engine.reshard_after_forward),
    }


def style(model: ModelConfig) -> str:
    """llama and gpt2 are these models exactly; every other assembly of the parts is mixed."""
    for name, parts in STYLES.items():
        if all(getattr(model, key) == value for key, value in parts.items()):
            return name
    return "mixed"


def clash(words: Mapping[str, str]) -> str | None:
    """Why no run can have these words together; None where one can. Words that are missing are not looked at."""
    engine, tp = words.get("engine", ""), words.get("tp")
    kind = _ENGINES.get(engine)
    allowed = _OFFLOADS.get(engine, kind.offloads if kind else None)
    offload, precision = words.get("offload", "none"), words.get("precision")
    if tp == "1" and words.get("sequence_parallel") == "on":
        return "sequence_parallel needs tp above 1"
    if allowed is not None and offload not in allowed:
        return f"{engine} cannot offload {offload}"
    if kind and precision == "fp16" and precision not in kind.precisions:
        return "only deepspeed has fp16"
    if kind and precision is not None and precision not in kind.precisions:
        return f"{kind.name} has no {precision}"
    if kind and words.get("reshard") == "off" and not kind.shards_parameters:
        return f"{engine} does not read reshard_after_forward"
    if engine == "zero3" and words.get("compile") == "on":
        return "zero3 gathers weights inside the blocks, where the compiler would have to break"
    return None


# Where the stage decides.
_OFFLOADS: Mapping[str, tuple[str, ...]] = {
    "zero0": ("none",),
    "zero1": ("none", "optimizer"),
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "all", "nvme"),
}


def _engine(cfg: RunConfig) -> str:
    traits = cfg.engine.traits
    if traits.uses_zero_stage:
        return f"zero{cfg.engine.zero_stage}"
    if traits.shards_parameters and cfg.parallel.dp_replicate > 1:
        return "hsdp"
    return cfg.engine.kind


def _on(value: bool) -> str:
    return "on" if value else "off"


# What may take the place of a value, the nearest first: no more memory of the accelerator where that is possible,
# and nothing that a user would have to learn first. tp only falls: a smaller power of two divides what a larger did.
_TRY: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "recompute": {
        "none": ("selective", "full", "every"),
        "full": ("every", "selective", "none"),
        "selective": ("full", "every", "none"),
        "every": ("full", "selective", "none"),
        "budget": ("selective", "full", "every", "none"),
    },
    "compile": {"on": ("off",)},
    "offload": {
        "optimizer": ("none",),
        "all": ("optimizer", "none"),
        "nvme": ("all", "optimizer", "none"),
    },
    "reshard": {"off": ("on",)},
    "sequence_parallel": {"on": ("off",), "off": ("on",)},
    "tp": {"8": ("4", "2", "1"), "4": ("2", "1"), "2": ("1",)},
    "engine": {
        "ddp": ("fsdp", "zero1", "zero2"),
        "fsdp": ("zero3", "zero2", "ddp"),
        "hsdp": ("fsdp", "zero3", "zero2"),
        "zero0": ("zero1", "ddp", "zero2", "fsdp"),
        "zero1": ("zero2", "zero3", "fsdp"),
        "zero2": ("zero1", "zero3", "fsdp"),
        "zero3": ("fsdp", "zero2", "zero1"),
    },
    "precision": {
        "fp32": ("bf16",),
        "bf16": ("fp32",),
        "fp64": ("fp32",),
        "fp16": ("bf16", "fp32"),
    },
    "documents": {"joined": ("separate",), "separate": ("joined",)},
    "dropout": {"on": ("off",)},
    "style": {"mixed": ("llama", "gpt2"), "gpt2": ("llama",), "llama": ("gpt2",)},
}
_HEAVY = ("tp", "engine", "precision")
MODEL = ("documents", "dropout", "style")  # another run: nobody changes a model to please a table
_MOST_CHANGES = 3


def _weight(names: tuple[str, ...]) -> tuple[int, int, int]:
    """Of a set of changes: those of the model first, then those of engine, tp and precision, then all."""
    return sum(n in MODEL for n in names), sum(n in _HEAVY for n in names), len(names)


_SETS = sorted(
    (names for size in range(1, _MOST_CHANGES + 1) for names in combinations(_TRY, size)),
    key=_weight,
)


def nearest(
    words: Mapping[str, str], proves: Callable[[Mapping[str, str]], bool]
) -> dict[str, str] | None:
    """The fewest and mildest changes that lead to a proven combination: {factor: new value}; None: none near."""
    for names in _SETS:
        for values in product(*(_TRY[name].get(words[name], ()) for name in names)):
            changes = dict(zip(names, values, strict=True))
            if proves({**words, **changes}):
                return changes
    return None


PATH = Path(__file__).with_name("proven.json")
READS = (*(key for keys in KEYS.values() for key in keys), "parallel.dp_shard")

Words = Mapping[str, str]
Point = tuple[str, str]  # a factor and its value
Triple = tuple[Point, ...]  # three factors, each with its value

# TP 8 needs all ranks of the largest tested world, so it is run once an engine; with other factors it counts
# as the largest size that all of them were crossed with.
_COUNTS_AS = {("tp", "8"): (("tp", "8"), ("tp", "4"))}


@dataclass(frozen=True, slots=True)
class UnprovenCombination:
    """A combination that is known not to work."""

    factors: Words
    why: str
    nearest: str


class ProvenTable:
    """The proven cases, each a bit: a combination occurred where the masks of its values share one."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """`document`: what proven.json holds. Raises KeyError for a case that lacks a factor."""
        self._masks: dict[Point, int] = {}
        for index, case in enumerate(document["cases"]):
            for factor in (*FACTORS, *OPEN):
                point = (factor, case[factor])
                self._masks[point] = self._masks.get(point, 0) | 1 << index
        self._refused = tuple(
            UnprovenCombination(entry["factors"], entry["why"], entry["nearest"])
            for entry in document["refused"]
        )

    @classmethod
    def read(cls, path: Path = PATH) -> "ProvenTable":
        """Raises ConfigError where the file is missing or is no such table."""
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fact = f"the table of proven combinations cannot be read: {path}: {error!r}"
            hint = "it is a part of lmscale that this installation lacks: install lmscale again"
            raise ConfigError([Problem("", fact, hint)]) from error

    def refused(self, words: Words) -> list[UnprovenCombination]:
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
    yield from problems(cfg, ProvenTable.read())


def problems(cfg: RunConfig, table: ProvenTable) -> Iterator[Problem]:
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
            return _engine_override(value, cfg)
        case "style":
            parts = STYLES[value].items()
            return " ".join(f"model.{k}={_text(v)}" for k, v in parts if getattr(cfg.model, k) != v)
        case "dropout":
            return f"{key}=0"
        case "recompute":
            return f"{key}={'every:2' if value == 'every' else value}"
    return f"{key}={_text({'on': True, 'off': False}.get(value, value))}"


def _engine_override(value: str, cfg: RunConfig) -> str:
    """Of keys that only one engine reads, those that are set go back to their defaults."""
    zero = value.startswith("zero")
    wanted = {
        "engine.kind": "deepspeed" if zero else value,
        "engine.zero_stage": int(value[-1]) if zero else 2,
        "parallel.dp_replicate": 1,
        "parallel.dp_shard": cfg.parallel.dp_shard if value == "fsdp" else "auto",
    }
    now = {
        "engine.kind": cfg.engine.kind,
        "engine.zero_stage": cfg.engine.zero_stage,
        "parallel.dp_replicate": cfg.parallel.dp_replicate,
        "parallel.dp_shard": cfg.parallel.dp_shard,
    }
    if cfg.parallel.dp_replicate > 1:
        wanted["parallel.dp_shard"] = "auto"
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
    if cfg.engine.traits.uses_zero_stage:
        return kind, stage
    return (kind, replicate) if cfg.parallel.dp_replicate > 1 else (kind,)
