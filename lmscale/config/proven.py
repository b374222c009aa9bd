"""Is this combination of settings covered by the gradient tests? A table that the gradient matrix wrote answers.

A run is described by eleven factors (engine, tp, precision, ...), each with one of a few values. The matrix
(tools/gradient_matrix.py) runs combinations of them and compares the gradients with those of one process; proven.json
contains the cases that passed, and what is refused with its reason. A run is proven when every three of its factor
values occurred together in a case that passed, for each value of the open factors (OPEN), which a restart may change.
An error that needs a third setting to show is then found. docs/gradients.md explains the design. Pure, without torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
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
    """The factor values of a run. A tp above the tested sizes counts as the largest of them."""
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
    """The style of a model: llama or gpt2 where all parts are theirs, mixed for any other combination."""
    for name, parts in STYLES.items():
        if all(getattr(model, key) == value for key, value in parts.items()):
            return name
    return "mixed"


def clash(values: Mapping[str, str]) -> str | None:
    """Why no run can have these values together; None where one can. Words that are missing are not looked at."""
    engine, tp = values.get("engine", ""), values.get("tp")
    kind = _ENGINES.get(engine)
    allowed = _OFFLOADS.get(engine, kind.offloads if kind else None)
    offload, precision = values.get("offload", "none"), values.get("precision")
    if tp == "1" and values.get("sequence_parallel") == "on":
        return "sequence_parallel needs tp above 1"
    if allowed is not None and offload not in allowed:
        return f"{engine} cannot offload {offload}"
    if kind and precision == "fp16" and precision not in kind.precisions:
        return "only deepspeed has fp16"
    if kind and precision is not None and precision not in kind.precisions:
        return f"{kind.name} has no {precision}"
    if kind and values.get("reshard") == "off" and not kind.shards_parameters:
        return f"{engine} does not read reshard_after_forward"
    if engine == "zero3" and values.get("compile") == "on":
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


PATH = Path(__file__).with_name("proven.json")
READS = (*(key for keys in KEYS.values() for key in keys), "parallel.dp_shard")

FactorValues = Mapping[str, str]  # by factor
Point = tuple[str, str]  # a factor and its value
Triple = tuple[Point, ...]  # three factors, each with its value

# TP 8 needs all ranks of the largest tested world, so it is run once per engine; with other factors it counts
# as TP 4, the largest size that was combined with all of them.
_COUNTS_AS = {("tp", "8"): (("tp", "8"), ("tp", "4"))}


@dataclass(frozen=True, slots=True)
class UnprovenCombination:
    """A combination that fails, or that was never compared with one process."""

    factors: FactorValues
    why: str
    nearest: str


class ProvenTable:
    """The proven cases, each a bit: a combination occurred where the masks of its values share one."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """`document`: the contents of proven.json. Raises KeyError for a case that lacks a factor."""
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
        """Raises ConfigError where the file is missing or is not such a table."""
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fact = f"the table of proven combinations cannot be read: {path}: {error!r}"
            hint = "the file is a part of lmscale: install lmscale again"
            raise ConfigError([Problem("", fact, hint)]) from error

    def refused(self, values: FactorValues) -> list[UnprovenCombination]:
        """The refused entries that this combination matches."""
        return [
            entry
            for entry in self._refused
            if all(self._matches(point, values) for point in entry.factors.items())
        ]

    def missing(self, values: FactorValues) -> Iterator[Triple]:
        """Each three factor values of this combination that no case had together; open factors come last."""
        points = [(point, self._mask(point)) for point in values.items()]
        points += [((f, value), self._mask((f, value))) for f in OPEN for value in OPEN[f]]
        for (a, in_a), (b, in_b), (c, in_c) in combinations(points, 3):
            if not in_a & in_b & in_c:
                values = dict((a, b, c))
                if len(values) == 3 and clash(values) is None:
                    yield a, b, c

    def proves(self, values: FactorValues) -> bool:
        """Whether a run can have these values, every three of them were run together, and none is refused."""
        possible = clash(values) is None and not self.refused(values)
        return possible and next(self.missing(values), None) is None

    @staticmethod
    def _matches(point: Point, values: FactorValues) -> bool:
        factor, _ = point
        return factor in OPEN or point in _counts_as((factor, values[factor]))

    def _mask(self, point: Point) -> int:
        mask = 0
        for equivalent in _counts_as(point):
            mask |= self._masks.get(equivalent, 0)
        return mask


def unproven(cfg: RunConfig) -> Iterator[Problem]:
    """What of this run the table that comes with lmscale does not cover. Raises ConfigError where it is missing."""
    yield from problems(cfg, ProvenTable.read())


def problems(cfg: RunConfig, table: ProvenTable) -> Iterator[Problem]:
    """What of this run is refused, or is not covered by the gradient tests.

    Combinations that cannot exist at all (`clash`) are not reported here: other checks name the keys.
    """
    values = factors(cfg)
    if clash(values) is not None:
        return
    refused = table.refused(values)
    for entry in refused:
        fact = f"{_named(entry.factors, cfg)} is refused: {entry.why}"
        yield Problem(_path(entry.factors), fact, entry.nearest or _HINT)
    if refused:
        return
    missing = list(table.missing(values))
    if missing:
        unproven_values = _common(missing)
        fact = f"{_named(unproven_values, cfg)} is not covered by the gradient tests"
        yield Problem(_path(unproven_values), fact, _HINT)


_HINT = "change one of these settings; docs/gradients.md lists the combinations that are covered"


def _common(missing: Sequence[Triple]) -> FactorValues:
    """The factor values that all missing triples share; the first triple where they share none."""
    common = set(missing[0]).intersection(*missing)
    if not any(factor in KEYS for factor, _ in common):
        return dict(missing[0])
    return {factor: value for factor, value in missing[0] if (factor, value) in common}


def _counts_as(point: Point) -> tuple[Point, ...]:
    return _COUNTS_AS.get(point, (point,))


def _path(values: FactorValues) -> str:
    """The key to report: that of the last factor named, since the first ones (engine, tp) cost most to change."""
    return KEYS[[factor for factor in values if factor in KEYS][-1]][0]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_OPEN_TEXTS = {
    ("accumulation", "1"): "one micro-batch per step",
    ("accumulation", "3"): "several micro-batches per step",
    ("targets", "equal"): "equal numbers of targets on the ranks",
    ("targets", "unequal"): "unequal numbers of targets on the ranks",
    ("world", "smallest"): "the smallest number of ranks",
    ("world", "largest"): "a large number of ranks",
}


def _named(values: FactorValues, cfg: RunConfig) -> str:
    """Factor values as keys of the run file with their values in this run."""
    parts = []
    for factor, value in values.items():
        if factor in OPEN:
            parts.append(_OPEN_TEXTS[factor, value])
            continue
        for key in _keys_of(factor, cfg):
            section, _, name = key.partition(".")
            parts.append(f"{key}={_text(getattr(getattr(cfg, section), name))}")
    return f"{', '.join(parts[:-1])} with {parts[-1]}" if len(parts) > 1 else parts[0]


def _keys_of(factor: str, cfg: RunConfig) -> tuple[str, ...]:
    """The keys that decide a factor in this run."""
    kind, stage, replicate = KEYS["engine"]
    if factor != "engine":
        return KEYS[factor]
    if cfg.engine.traits.uses_zero_stage:
        return kind, stage
    return (kind, replicate) if cfg.parallel.dp_replicate > 1 else (kind,)
