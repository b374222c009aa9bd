"""Who runs against whom: data, and nothing is run here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

PRECISIONS = ("fp32", "bf16")
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Contender:
    name: str
    venv: str  # of venvs.py; "" = the one that lmscale is installed in
    program: str  # a module beside this file
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        return self.options.get("way") != "products"


@dataclass(frozen=True)
class Bar:
    """What is asked for: `own` at least `least` times as fast as `peer`."""

    own: str
    peer: str
    least: float


def every() -> dict[str, Contender]:
    """All contenders by name, PRECISION last."""
    found = [one for precision in PRECISIONS for one in (*_ours(precision), *_peers(precision))]
    return {one.name: one for one in found}


def _ours(precision: str) -> list[Contender]:
    engines: dict[str, dict[str, Any]] = {
        "ddp": {"kind": "ddp"},
        "fsdp": {"kind": "fsdp"},
        **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in STAGES},
    }
    variants: dict[str, dict[str, Any]] = {
        **engines,
        "fsdp-kept": {"kind": "fsdp", "reshard_after_forward": False},
        # Not stage 3, whose hooks inside the blocks cannot be compiled.
        **{
            f"{name}-compiled": {**keys, "compile": True}
            for name, keys in engines.items()
            if name != "zero3"
        },
        "fsdp-kept-compiled": {"kind": "fsdp", "reshard_after_forward": False, "compile": True},
    }
    return [
        Contender(f"lmscale-{name}-{precision}", "", "ours", precision, keys)
        for name, keys in variants.items()
    ]


def _peers(precision: str) -> list[Contender]:
    def by_hand(name: str, way: str, **options: Any) -> Contender:
        options = {"way": way, **options}
        return Contender(f"{name}-{precision}", "hf", "hand", precision, options)

    way = "plain" if precision == "fp32" else "masters"
    # Two workers of one program: what they differ in is noise.
    found = [by_hand("hand", way), by_hand("hand-again", way)]
    found.append(by_hand("hand-compiled", way, compile=True))
    if precision == "bf16":
        found.append(by_hand("hand-autocast", "autocast"))
    found += [by_hand("direct-ddp", "ddp"), by_hand("direct-fsdp2", "fsdp2")]
    found += [by_hand(f"direct-deepspeed{s}", "deepspeed", stage=s) for s in STAGES]
    found.append(by_hand("products", "products", size=2048, times=2))
    return [
        *found,
        Contender(f"hf-{precision}", "hf", "huggingface", precision),
        Contender(f"hf-compiled-{precision}", "hf", "huggingface", precision, {"compile": True}),
        Contender(f"litgpt-{precision}", "litgpt", "lit", precision),
    ]


# One run holds about twenty workers of a gigabyte; the rest is for --contenders.
DEFAULT = (
    *("hand-*", "hf-*", "litgpt-*", "products-*", "direct-ddp-*", "direct-fsdp2-*"),
    *("direct-deepspeed2-*", "lmscale-ddp-*", "lmscale-fsdp-*", "lmscale-zero2-*"),
)
_NOT_BY_DEFAULT = ("*-compiled-*", "*-kept-*", "direct-ddp-bf16")


def chosen(patterns: Sequence[str]) -> list[Contender]:
    """Those that a pattern names, with the hand-written loop, its twin and the products of their precisions."""
    found = every()
    names = [name for name in found if _matches(name, patterns or DEFAULT)]
    if not patterns:
        names = [name for name in names if not _matches(name, _NOT_BY_DEFAULT)]
    if not names:
        raise SystemExit(f"no contender matches {' '.join(patterns)}; there are {' '.join(found)}")
    for precision in {found[name].precision for name in names}:
        names += [f"{base}-{precision}" for base in ("hand", "hand-again", "products")]
    return [found[name] for name in found if name in set(names)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def reference(contender: Contender) -> str:
    """The loop that a contender's ratio is given to."""
    return f"hand-{contender.precision}"


def bars(names: Sequence[str]) -> list[Bar]:
    """What is asked of lmscale, as far as both sides run."""
    direct = {"ddp": "direct-ddp", "fsdp": "direct-fsdp2"}
    direct |= {f"zero{stage}": f"direct-deepspeed{stage}" for stage in STAGES}
    wanted = []
    for name in (name for name in names if name.startswith("lmscale-")):
        engine, precision = name.split("-")[1], name.rsplit("-", 1)[1]
        if precision == "fp32":
            wanted.append(Bar(name, f"{direct[engine]}-fp32", 0.97))
            if engine == "ddp":
                wanted.append(Bar(name, "hf-fp32", 1.0))
        else:
            wanted.append(Bar(name, "hf-bf16", 1.2))
    return [bar for bar in wanted if bar.peer in names]
