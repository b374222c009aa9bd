"""What the validation found, in plain words: dotted path, fact with the value, next action."""

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from lmscale.base.errors import Problem
from lmscale.config.fields import key_of, shown
from lmscale.config.schema import RunConfig
from lmscale.config.yaml import KeyPath, dotted

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a section (keys and values)",
    "finite_number": "a finite number",
}
_LIMITS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
}


def in_words(error: Mapping[str, Any], *, origin: Callable[[KeyPath], str]) -> Problem:
    """One entry of ValidationError.errors() as a Problem."""
    path, kind = tuple(error["loc"]), error["type"]
    fact, hint = _words(kind, path, error["input"], error.get("ctx", {}))
    place = "" if kind == "missing" else origin(path)
    return Problem(dotted(path), f"{fact} ({place})" if place else fact, hint)


def _words(kind: str, path: KeyPath, value: object, ctx: Mapping[str, Any]) -> tuple[str, str]:
    match kind:
        case "extra_forbidden":
            return "unknown key", _did_you_mean(path)
        case "missing":
            return "missing", _how_to_add(path)
        case "value_error":
            fact, _, hint = str(ctx["error"]).partition("; ")
            return fact, hint
        case "literal_error":
            choices = re.findall(r"'([^']*)'|(\d+)", str(ctx["expected"]))
            return _choice([text or number for text, number in choices], value)
        case "too_short" | "too_long" | "string_too_short":
            return "is empty" if _empty(value) else f"has {_length(value)} entries", _about(path)
        case _ if kind in _LIMITS:
            name, words = _LIMITS[kind]
            return f"{words} {ctx[name]:g}, got {shown(value)}", ""
        case _ if kind in _EXPECTED:
            return f"expected {_EXPECTED[kind]}, got {shown(value)}", _retype(kind, value)
    return f"cannot use {shown(value)}", _about(path)


def _retype(kind: str, value: object) -> str:
    if kind == "bool_type" and isinstance(value, str):
        if value.lower() in ("on", "yes", "y"):
            return "write true"
        return "write false" if value.lower() in ("off", "no", "n") else "write true or false"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        plain = value.replace("_", "").strip()
        if re.fullmatch(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?", plain):
            return f"write {plain}, without quotes or underscores"
    if kind == "string_type" and isinstance(value, (int, float)):
        return f'write "{shown(value)}", with quotes'
    return ""


def _choice(choices: list[str], value: object) -> tuple[str, str]:
    close = get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {close[0]!r}?" if close else ""
    return f"{shown(value)} is not one of: {', '.join(choices)}", hint


def _empty(value: object) -> bool:
    return _length(value) == 0


def _length(value: object) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 1


def _about(path: KeyPath) -> str:
    """The description of the field at `path`."""
    parent = section_at(path[:-1])
    for key, field in fields_of(parent) if parent else ():
        if key == path[-1]:
            return field.description or ""
    return ""


def _how_to_add(path: KeyPath) -> str:
    parent = section_at(path[:-1])
    for key, field in fields_of(parent) if parent else ():
        if key == path[-1] and field.examples:
            return f"add {dotted(path)}: {field.description}, e.g. {field.examples[0]}"
    return "one value is missing from the list" if isinstance(path[-1], int) else ""


def _did_you_mean(path: KeyPath) -> str:
    key = str(path[-1])
    parent = section_at(path[:-1])
    known = [name for name, _ in fields_of(parent)] if parent else []
    close = get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    elsewhere = _elsewhere(key)
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known keys: {', '.join(known)}" if known else ""


def _elsewhere(key: str) -> list[str]:
    """Dotted names in other sections, for a key that was put into the wrong one."""
    homes = [
        f"{section}.{name}"
        for section, field in RunConfig.model_fields.items()
        for name, _ in fields_of(model_in(field.annotation))
        if name == key
    ]
    if homes or "." in key:
        return homes
    return []


def fields_of(model: type[BaseModel] | None) -> Iterator[tuple[str, Any]]:
    """Keys as they stand in a run file, with their declarations."""
    for name, field in model.model_fields.items() if model else ():
        yield key_of(name, field), field


def section_at(path: KeyPath) -> type[BaseModel] | None:
    """The model that describes the mapping at `path`, if there is one."""
    model: type[BaseModel] | None = RunConfig
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        annotation = next((f.annotation for key, f in fields_of(model) if key == part), None)
        model = model_in(annotation)
    return model


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `tuple[CorpusConfig, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (model_in(part) for part in typing.get_args(annotation))
    return next((model for model in inner if model), None)
