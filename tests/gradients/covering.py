"""Few cases in which every two or three values of different factors occur together (covering arrays).

A constraint says what is wrong with some values; a combination that no whole case can have is left out. The search is
covertable's (greedy, with constraints); it is deterministic for a salt.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from covertable import make

Factors = Mapping[str, Sequence[str]]
Case = Mapping[str, str]
# Why these values exclude each other, None if they do not. Factors that it does not know of yet are missing.
Problem = Callable[[Case], str | None]


def covering(
    factors: Factors,
    strength: int,
    constraints: Iterable[tuple[Sequence[str], Problem]],
    *,
    salt: str = "0",
) -> list[dict[str, str]]:
    """The array that is found with this salt. A constraint names the factors that it reads."""
    conditions = [_condition(keys, problem) for keys, problem in constraints]
    found: list[dict[str, str]] = make(
        dict(factors), strength=strength, constraints=conditions, salt=salt, tolerance=2
    )
    return found


def uncovered(
    cases: Sequence[Case], factors: Factors, strength: int, problem: Problem
) -> Iterator[dict[str, str]]:
    """Combinations that a legal case can have and none of these has, by trying all: the proof of an array."""
    for names in combinations(factors, strength):
        seen = {tuple(case[name] for name in names) for case in cases}
        for values in product(*(factors[name] for name in names)):
            wanted = dict(zip(names, values, strict=True))
            if values not in seen and _possible(wanted, factors, problem):
                yield wanted


def _possible(wanted: dict[str, str], factors: Factors, problem: Problem) -> bool:
    """Whether some legal case has these values: depth first over the other factors, one after another."""
    if problem(wanted):
        return False
    left = [name for name in factors if name not in wanted]
    if not left:
        return True
    return any(
        _possible({**wanted, left[0]: value}, factors, problem) for value in factors[left[0]]
    )


def _condition(keys: Sequence[str], problem: Problem) -> dict[str, Any]:
    def legal(row: Case) -> bool:
        return problem({key: row[key] for key in keys}) is None

    return {"operator": "fn", "requires": list(keys), "evaluate": legal}
