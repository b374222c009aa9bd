"""Slurm's short form of host names, `n[1-3,07]-ib`, one by one. For where scontrol is missing or refuses."""

import re
from collections.abc import Iterator
from itertools import product

# Brackets hold no brackets, and a comma inside them does not end a name.
_NAME = re.compile(r"(?:[^,\[\]\s]|\[[^\[\]]*\])+")
_PIECE = re.compile(r"\[([^\]]*)\]|([^\[]+)")
_RANGE = re.compile(r"\s*([0-9]+)(?:-([0-9]+))?\s*")
_MOST = 1 << 20  # Slurm itself knows 65,536 nodes


def expand(text: str) -> list[str]:
    """Every host of a list, in its order. Raises ValueError for text that is no list of hosts.

    Unlike `scontrol show hostnames` of 22.05 it knows text after a bracket: `gpu-[001-003]x`.
    """
    found: list[str] = []
    for name in _names(text):
        parts = [_choices(ranges, name) if ranges else [plain] for ranges, plain in _pieces(name)]
        count = 1
        for choices in parts:
            count *= len(choices)
        if len(found) + count > _MOST:
            raise ValueError(f"{text[:80]!r} names more than {_MOST} hosts")
        found.extend("".join(chosen) for chosen in product(*parts))
    return found


def _names(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        if text[at] == "," or text[at].isspace():
            at += 1
        elif match := _NAME.match(text, at):
            yield match[0]
            at = match.end()
        else:
            raise ValueError(f"{text!r} is no list of hosts: look at its brackets")


def _pieces(name: str) -> Iterator[tuple[str, str]]:
    """(ranges, "") for a bracket, ("", text) for what stands between."""
    for match in _PIECE.finditer(name):
        if match[1] == "":
            raise ValueError(f"{name!r} has an empty bracket")
        yield match[1] or "", match[2] or ""


def _choices(ranges: str, name: str) -> list[str]:
    """`1-3,07`: 1, 2, 3, 07. A number is as wide as the first of its range."""
    found: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{name!r}: {part!r} is no number and no range of numbers")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + _MOST:
            raise ValueError(f"{name!r}: {part!r} is no range from a smaller to a larger number")
        found.extend(str(number).zfill(len(match[1])) for number in range(first, last + 1))
    return found
