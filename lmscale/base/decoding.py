"""Strict decoding of JSON from disk or wire: bounded parsing, then a check of every type.

Files and messages come from other hosts, other versions, crashes and sometimes from an attacker. All that
can be wrong with them is one typed error, RecordError, which names file, place, fact and next action:
invalid UTF-8, a syntax error, a repeated key, NaN, a number beyond 64 bits, deep nesting, too many bytes, a
missing key, a wrong type, a value out of range.

A *spec* is a type: a dataclass or TypedDict whose fields are specs, or bool, int, float, str, None, Literal,
unions, list[S], tuple[S, ...], tuple[S, T], dict[str, S], Any (any JSON value), and
Annotated[S, Range(0, 10)] or Annotated[S, Length(1, 64)]. Plain Python rather than pydantic: the parser's
limits are needed in any case, and `verify` and `logs` do without pydantic's 45 ms.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from lmscale.base.fs import read_regular
from lmscale.base.json_text import (
    DEFAULT_LIMITS,
    LARGEST,
    RESTORE,
    SMALLEST,
    Limits,
    RecordError,
    parse_json,
    shortened,
)

__all__ = [
    "Length",
    "Limits",
    "Range",
    "RecordError",
    "convert",
    "decode",
    "decode_file",
    "parse_json",
]

T = TypeVar("T")
_Convert = Callable[[Any], Any]
_SHOWN_CHARS = 120  # of a text, before its repr is shortened


@dataclass(frozen=True, slots=True)
class Range:
    """For Annotated: smallest and largest allowed number, both included; None is unbounded."""

    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class Length:
    """For Annotated: smallest and largest number of characters or entries, both included."""

    minimum: int = 0
    maximum: int | None = None


# ---- the four entry points -----------------------------------------------------------------------


def decode(
    spec: type[T],
    data: bytes | str,
    *,
    where: object,
    limits: Limits = DEFAULT_LIMITS,
    hint: str = RESTORE,
    closed: bool = False,
) -> T:
    """The value that this JSON text describes. Raises RecordError, whatever is wrong with the text.

    `where` (a path, or the peer of a connection) and `hint` (the next action) are for the message.
    Keys that the spec does not have are kept in a TypedDict and dropped for a dataclass; where the
    spec is `closed`, its outermost object is refused with them.
    """
    value = parse_json(data, where=where, limits=limits, hint=hint)
    return convert(spec, value, where=where, hint=hint, closed=closed)


def decode_file(
    spec: type[T],
    path: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    hint: str = RESTORE,
    closed: bool = False,
) -> T:
    """`decode` for the content of a regular file. Raises RecordError, UnsuitableFile and OSError."""
    data = read_regular(path, limits.max_bytes)
    return decode(spec, data, where=path, limits=limits, hint=hint, closed=closed)


def convert(
    spec: type[T], value: object, *, where: object, hint: str = RESTORE, closed: bool = False
) -> T:
    """A parsed JSON value as the spec's type. Raises RecordError with the place in the value."""
    try:
        if closed and isinstance(value, Mapping):
            _refuse_unknown(spec, value)
        found: T = _converter(typing.cast(Any, spec))(value)
        return found
    except _MismatchError as error:
        at = "".join(reversed(error.place)).removeprefix(".")
        raise RecordError(f"{where}: {at + ': ' if at else ''}{error.fact}; {hint}") from None
    except RecursionError:
        raise RecordError(f"{where}: nested too deeply; {hint}") from None


# ---- checking types ------------------------------------------------------------------------------


class _MismatchError(Exception):
    """A value that does not fit; containers add their part of the place on the way out."""

    def __init__(self, fact: str) -> None:
        super().__init__(fact)
        self.fact = fact
        self.place: list[str] = []  # innermost first


@lru_cache(maxsize=512)
def _converter(spec: Any) -> _Convert:
    """The function that checks and converts a value of this spec."""
    if spec is Any or spec is object:
        return _any
    if isinstance(spec, type) and spec in _PLAIN:
        return _PLAIN[spec]
    if spec is None or spec is type(None):
        return _none
    if dataclasses.is_dataclass(spec):
        return _dataclass_converter(typing.cast(type, spec))
    if typing.is_typeddict(spec):
        return _typed_dict_converter(spec)
    origin, args = typing.get_origin(spec), typing.get_args(spec)
    make = _GENERIC.get(origin)
    assert make is not None, f"no decoder for {spec}"
    return make(*args)


def _any(value: Any) -> Any:
    return value  # what the parser returns is within the limits


def _none(value: Any) -> None:
    if value is not None:
        raise _wrong("null", value)


def _bool(value: Any) -> bool:
    if value is True or value is False:
        return bool(value)
    raise _wrong("true or false", value)


def _int(value: Any) -> int:
    if type(value) is not int:
        raise _wrong("a whole number", value)
    return value


def _float(value: Any) -> float:
    if type(value) is float:
        if not math.isfinite(value):
            raise _wrong("a finite number", value)
        return value
    if type(value) is int and SMALLEST <= value <= LARGEST:
        return float(value)
    raise _wrong("a number", value)


def _str(value: Any) -> str:
    if type(value) is not str:
        raise _wrong("a text", value)
    return value


_PLAIN: dict[type, _Convert] = {bool: _bool, int: _int, float: _float, str: _str}


def _union(*specs: Any) -> _Convert:
    members = [_converter(spec) for spec in specs]
    names = " or ".join(_name_of(spec) for spec in specs)

    def apply(value: Any) -> Any:
        deepest: _MismatchError | None = None
        for member in members:
            try:
                return member(value)
            except _MismatchError as error:
                if error.place and (deepest is None or len(error.place) > len(deepest.place)):
                    deepest = error
        raise deepest or _wrong(names, value)

    return apply


def _literal(*allowed: Any) -> _Convert:
    def apply(value: Any) -> Any:
        for candidate in allowed:
            if type(candidate) is type(value) and candidate == value:
                return candidate
        raise _wrong("one of " + ", ".join(map(repr, allowed)), value)

    return apply


def _list(item: Any = Any) -> _Convert:
    convert_item, all_fit = _converter(item), _bulk_check(item)

    def apply(value: Any) -> list[Any]:
        if type(value) is not list:
            raise _wrong("a list", value)
        return value if all_fit(value) else _items(value, convert_item)

    return apply


def _bulk_check(item: Any) -> Callable[[list[Any]], bool]:
    """A quick look at a whole list: whether no entry needs a look of its own. Checksums are many."""
    args = typing.get_args(item) if typing.get_origin(item) is typing.Annotated else (item,)
    kind, bounds = args[0], args[1:]
    if kind is Any or kind is object:
        return lambda values: not bounds
    if kind not in (int, str) or not all(isinstance(bound, Range) for bound in bounds):
        return lambda values: False

    def apply(values: list[Any]) -> bool:
        if set(map(type, values)) != {kind}:
            return False
        return all(
            (bound.minimum is None or bound.minimum <= min(values))
            and (bound.maximum is None or max(values) <= bound.maximum)
            for bound in bounds
        )

    return apply


def _sequence(*specs: Any) -> _Convert:
    """tuple[S, ...] and tuple[S, T]."""
    if len(specs) == 2 and specs[1] is Ellipsis:
        of_list = _list(specs[0])
        return lambda value: tuple(of_list(value))
    members = [_converter(spec) for spec in specs]

    def apply(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != len(members):
            raise _wrong(f"a list of {len(members)}", value)
        return tuple(
            _at(f"[{n}]", m, v) for n, (m, v) in enumerate(zip(members, value, strict=True))
        )

    return apply


def _mapping(key: Any = str, item: Any = Any) -> _Convert:
    assert key is str, "JSON's keys are texts"
    convert_item = _converter(item)

    def apply(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise _wrong("an object", value)
        if convert_item is _any:
            return value
        key = ""
        try:
            found = {}
            for key, entry in value.items():
                found[key] = convert_item(entry)
            return found
        except _MismatchError as error:
            error.place.append(_key_place(key))
            raise

    return apply


def _annotated(spec: Any, *constraints: Any) -> _Convert:
    plain = _converter(spec)

    def apply(value: Any) -> Any:
        found = plain(value)
        for constraint in constraints:
            _constrain(found, constraint, value)
        return found

    return apply


def _constrain(found: Any, constraint: object, value: object) -> None:
    match constraint:
        case Range(minimum, maximum):
            if minimum is not None and found < minimum:
                raise _wrong(f"at least {minimum}", value)
            if maximum is not None and found > maximum:
                raise _wrong(f"at most {maximum}", value)
        case Length(shortest, longest):
            if len(found) < shortest or (longest is not None and len(found) > longest):
                bound = f"{shortest} or more" if longest is None else f"{shortest} to {longest}"
                raise _wrong(f"of length {bound}", value)


_GENERIC: dict[Any, Callable[..., _Convert]] = {
    typing.Union: _union,
    types.UnionType: _union,
    typing.Literal: _literal,
    typing.Annotated: _annotated,
    list: _list,
    Sequence: lambda item: _sequence(item, ...),
    tuple: _sequence,
    dict: _mapping,
    Mapping: _mapping,
}


def _dataclass_converter(spec: type) -> _Convert:
    hints = typing.get_type_hints(spec, include_extras=True)
    fields = [field for field in dataclasses.fields(spec) if field.init]
    missing = dataclasses.MISSING
    required = {f.name for f in fields if f.default is missing and f.default_factory is missing}
    members = [(field.name, _converter(hints[field.name])) for field in fields]

    def apply(value: Any) -> Any:
        return spec(**_members_of(value, members, required))

    return apply


def _typed_dict_converter(spec: Any) -> _Convert:
    hints = typing.get_type_hints(spec, include_extras=True)
    members = [(name, _converter(_bare(hint))) for name, hint in hints.items()]
    required = set(spec.__required_keys__)

    def apply(value: Any) -> dict[str, Any]:
        found = _members_of(value, members, required)
        return found if len(found) == len(value) else {**value, **found}

    return apply


def _members_of(
    value: Any, members: list[tuple[str, _Convert]], required: set[str]
) -> dict[str, Any]:
    if type(value) is not dict:
        raise _wrong("an object", value)
    if not required <= value.keys():
        raise _MismatchError(f"the key {min(required - value.keys())!r} is missing")
    found: dict[str, Any] = {}
    name = ""
    try:
        for name, member in members:
            if name in value:
                found[name] = member(value[name])
    except _MismatchError as error:
        error.place.append(_key_place(name))
        raise
    return found


def _bare(hint: Any) -> Any:
    """A TypedDict's hint without Required[] and NotRequired[]."""
    if typing.get_origin(hint) in (typing.Required, typing.NotRequired):
        return typing.get_args(hint)[0]
    return hint


def _refuse_unknown(spec: Any, value: Mapping[str, Any]) -> None:
    known = typing.get_type_hints(spec)
    if unknown := next((key for key in value if key not in known), None):
        raise _MismatchError(f"the key {shortened(repr(unknown))} is not known")


def _items(values: list[Any], convert_item: _Convert) -> list[Any]:
    found: list[Any] = []
    try:
        for value in values:
            found.append(convert_item(value))
    except _MismatchError as error:
        error.place.append(f"[{len(found)}]")
        raise
    return found


def _at(place: str, member: _Convert, value: Any) -> Any:
    try:
        return member(value)
    except _MismatchError as error:
        error.place.append(place)
        raise


def _key_place(key: str) -> str:
    return f".{key}" if key.isidentifier() and key.isascii() else f"[{shortened(repr(key))}]"


def _wrong(expected: str, value: object) -> _MismatchError:
    return _MismatchError(f"expected {expected}, got {_shown(value)}")


def _shown(value: object) -> str:
    """A value for a message: short and, as repr() escapes what does not print, safe for a terminal."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {shortened(repr(value[:_SHOWN_CHARS]))}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {len(value)} keys"
        case int() if value.bit_length() > 64:
            return f"a number of {value.bit_length()} bits"
        case _:
            return shortened(repr(value))


def _name_of(spec: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text",
             type(None): "null", list: "a list", tuple: "a list", dict: "an object"}  # fmt: skip
    origin = typing.get_origin(spec)
    if origin is typing.Annotated:
        return _name_of(typing.get_args(spec)[0])
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(spec)))
    return names.get(origin or spec, "an object")
