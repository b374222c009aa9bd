"""How far a case is from one process, and how far it may be.

    error of a tensor    |a - b| / max(|b|, 1e-3 |g| sqrt(share)), Euclidean norms; |g| the whole gradient's, share the
                         tensor's part of all elements: below a thousandth of the average a gradient is taken absolutely
    error of an update   |p_a - p_b| / |p_b - p_0| of a parameter after three steps
    zero                 |a| / (|g| sqrt(share)) of what is zero in theory: key biases, which softmax does not notice.
                         The vocabulary's padding must be zero exactly

b is one process in the same precision. A tensor may be off by its tolerance, or by twice what one process in this
precision is from one in the next wider: a and b are both about that far from the truth, on any sides of it. Of bf16
gradients that is up to 0.04 (LayerNorms of `gpt2`), whatever the tokens and however wide the weights start.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tests.gradients.case import GradientCase, model_of, padding_rows, unreachable
from tests.gradients.run import Outcome, one_process

Errors = dict[str, float]
_WIDER = {"fp32": "fp64", "bf16": "fp32", "fp16": "fp32"}
KEYS = ("loss", "norm", "gradient", "update", "zero")
_FLOOR = 1e-3

# fp64 and fp32: sums in another order. In low precision one rounding is 4e-3 (bf16), and every cut of a batch or a
# matrix rounds other sums. Adam divides each gradient by its own size, which makes the noise of a small one as large
# as any other's, and the second and third gradient begin where that has led: an update gets three times as much.
_NARROW = {**dict.fromkeys(KEYS, 2e-2), "update": 6e-2}
TOLERANCE: Mapping[str, Errors] = {
    "fp64": dict.fromkeys(KEYS, 1e-10),
    "fp32": dict.fromkeys(KEYS, 5e-6),
    "bf16": _NARROW,
    "fp16": _NARROW,
}


def verdict(
    case: GradientCase, answers: Sequence[Outcome], wanted: Outcome
) -> tuple[Errors, list[str]]:
    """The largest error of each kind, and every reason why the case does not pass; `answers` are the ranks'."""
    problems = [
        f"rank {rank} found other results than rank 0"
        for rank, answer in enumerate(answers)
        if answer.results != answers[0].results
    ]
    if answers[0].gradients.keys() != wanted.gradients.keys():
        return {}, [*problems, "other parameters have gradients than in one process"]
    largest, beyond = compared(case, answers[0], wanted)
    return largest, [*problems, *beyond, *_exact(case, answers[0], wanted)]


def compared(case: GradientCase, found: Outcome, wanted: Outcome) -> tuple[Errors, list[str]]:
    """The largest error of each kind, and of those that are beyond what is allowed the worst of each kind."""
    largest, tolerance, own = dict.fromkeys(KEYS, 0.0), TOLERANCE[case.precision], _rounding(case)
    worst: dict[str, tuple[float, str]] = {}
    for key, error, where in _errors(case, found, wanted):
        largest[key] = max(largest[key], error)
        allowed = max(tolerance[key], own.get((key, where), 0.0))
        if not error <= allowed:
            words = f"{key} is off by {error:.1e}, more than {allowed:.0e}: {where}"
            worst[key] = max(worst.get(key, (0.0, "")), (error / allowed, words))
    return largest, [words for _, words in worst.values()]


def _rounding(case: GradientCase) -> Mapping[tuple[str, str], float]:
    """By kind and place: twice how far one process in this precision is from one in the next wider."""
    wider = _WIDER.get(case.precision)
    if wider is None or case.dropout == "drawn":  # torch draws other masks in another precision
        return {}
    pair = (one_process(one) for one in (case, replace(case, precision=wider)))
    return {(key, where): 2 * error for key, error, where in _errors(case, *pair)}


def _errors(
    case: GradientCase, found: Outcome, wanted: Outcome
) -> Iterator[tuple[str, float, str]]:
    for step, (a, b) in enumerate(zip(found.results, wanted.results, strict=True), start=1):
        for key in ("loss", "norm"):
            yield key, _quotient(abs(a[key] - b[key]), abs(b[key])), f"step {step}"
    start = {name: p.detach() for name, p in model_of(case).named_parameters()}
    norm = _length(wanted.gradients.values())
    total = sum(value.numel() for value in wanted.gradients.values())
    for name, b in wanted.gradients.items():
        a, share = found.gradients[name], norm * math.sqrt(b.numel() / total)
        if unreachable(name, case):
            yield "zero", _quotient(_length([a]), share), name
            continue
        yield "gradient", _quotient(_apart(a, b), max(_length([b]), _FLOOR * share)), name
        end = wanted.parameters[name]
        apart = _apart(found.parameters[name], end)
        yield "update", _quotient(apart, _apart(end, start[name])), name


def _exact(case: GradientCase, found: Outcome, wanted: Outcome) -> Iterator[str]:
    for step, (a, b) in enumerate(zip(found.results, wanted.results, strict=True), start=1):
        for key in ("weight", "applied"):
            if a[key] != b[key]:
                yield f"step {step}: {key} is {a[key]}, of one process {b[key]}"
    for name, spread in list(found.spread.items())[:3]:
        yield f"{name}: its copies on several ranks are {spread:.1e} apart"
    for name, value in found.parameters.items():
        rows = padding_rows(name, case)
        if rows is not None and (found.gradients[name][rows].any() or value[rows].any()):
            yield f"{name}: the vocabulary's padding has a gradient or has moved"


def _apart(a: Tensor, b: Tensor) -> float:
    return _length([a.double() - b.double()])


def _length(tensors: Iterable[Tensor]) -> float:
    """Euclidean, of all elements together."""
    return math.sqrt(sum(torch.linalg.vector_norm(t.double()).item() ** 2 for t in tensors))


def _quotient(difference: float, size: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size else (math.inf if difference else 0.0)
