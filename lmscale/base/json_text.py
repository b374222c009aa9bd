"""A bounded JSON parser: what it refuses is one typed error.

Invalid UTF-8, a syntax error, a repeated key, NaN, numbers beyond 64 bits or of very many characters, deep
nesting and too many bytes are found before the value is used, in time linear to the text.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from lmscale.base.errors import DataError

SMALLEST, LARGEST = -(1 << 63), (1 << 64) - 1
RESTORE = "restore it from a copy"
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NOT_BRACKETS = bytes(set(range(256)) - set(_STEP))
_SHOWN_CHARS = 60


class RecordError(DataError):
    """JSON from disk or wire that is not what it must be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what is parsed at all."""

    max_bytes: int = 1 << 26
    max_depth: int = 64  # of lists and objects within each other
    max_number_chars: int = 64
    wide_integers: bool = False  # whole numbers beyond 64 bits too, as some foreign files have
    foreign: bool = (
        False  # a byte order mark and repeated keys too, as other programs write and accept them
    )


DEFAULT_LIMITS = Limits()


def parse_json(
    data: bytes | str, *, where: object, limits: Limits = DEFAULT_LIMITS, hint: str = RESTORE
) -> Any:
    """The JSON value of a text within the limits, not yet checked against a spec. Raises RecordError."""
    try:
        if len(data) > limits.max_bytes:
            raise ValueError(f"{len(data)} bytes, at most {limits.max_bytes} are allowed")
        text = (
            data
            if isinstance(data, str)
            else data.decode("utf-8-sig" if limits.foreign else "utf-8")
        )
        _check_depth(text, limits.max_depth)
        return _decoder(limits.max_number_chars, limits.wide_integers, limits.foreign).decode(text)
    except UnicodeDecodeError as error:
        fact = f"not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        fact = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        fact = "nested too deeply"
    except (ValueError, OverflowError) as error:
        fact = str(error)
    except MemoryError:
        fact = "too large for this host's memory"
    raise RecordError(f"{where}: {fact}; {hint}")


def _check_depth(text: str, max_depth: int) -> None:
    if text.count("[") + text.count("{") <= max_depth:
        return
    # Strings may contain brackets: they are removed first, and their escapes before that.
    plain = text.replace("\\\\", "").replace('\\"', "").split('"')[::2]
    brackets = "".join(plain).encode("utf-8", "replace").translate(None, _NOT_BRACKETS)
    if max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > max_depth:
        raise ValueError(f"nested more than {max_depth} levels deep")


@lru_cache(maxsize=8)
def _decoder(max_number_chars: int, wide_integers: bool, foreign: bool) -> json.JSONDecoder:
    def whole(text: str) -> int:
        # int() of many digits takes quadratic time, and 20 are enough for 64 bits.
        number = int(text) if len(text) <= (max_number_chars if wide_integers else 20) else None
        if number is None or not (wide_integers or SMALLEST <= number <= LARGEST):
            raise ValueError(f"the number {shortened(text)} is beyond 64 bits")
        return number

    def real(text: str) -> float:
        if len(text) > max_number_chars:
            raise ValueError(f"the number {shortened(text)} has {len(text)} characters")
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"the number {shortened(text)} is beyond 64 bits")
        return number

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise ValueError(
                f"the key {shortened(repr(counts.most_common(1)[0][0]))} is given twice"
            )
        return found

    return json.JSONDecoder(
        parse_int=whole,
        parse_float=real,
        parse_constant=constant,
        object_pairs_hook=None if foreign else unique,
    )


def shortened(text: str) -> str:
    """A part of a message, cut to what a reader needs."""
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
