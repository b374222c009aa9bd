"""Validation errors of pydantic as problems in plain English: dotted key, fact with the value, next action."""

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from lmscale.base.errors import Problem
from lmscale.config.aliases import advice_for, key_for, normal, section_for
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


def in_words(error: Mapping[str, Any], *, origin: Callable[[KeyPath], str]) -> list[Problem]:
    """One entry of ValidationError.errors() as problems: several for a section of another project."""
    path, kind = tuple(error["loc"]), error["type"]
    location = "" if kind == "missing" else origin(path)
    suffix = f" ({location})" if location else ""
    value = error["input"]
    if kind == "extra_forbidden" and len(path) == 1 and isinstance(value, Mapping):
        return list(_unknown_section(str(path[0]), value, suffix, origin))
    fact, hint = _words(kind, path, value, error.get("ctx", {}))
    return [Problem(dotted(path), fact + suffix, hint)]


def renamed(error: Mapping[str, Any]) -> set[str]:
    """Our keys that an unknown key or section has under other names: they are not missing as well."""
    path, value = tuple(error["loc"]), error["input"]
    if error["type"] != "extra_forbidden":
        return set()
    paths = [path]
    if len(path) == 1 and isinstance(value, Mapping):
        paths = [(path[0], str(key)) for key in value]
    return {key for inner in paths if (key := _our_key(inner)) is not None}


def _our_key(path: KeyPath) -> str | None:
    """Our dotted key for an unknown key: by its name in another project, else by its name here."""
    if len(path) > 2:
        return None
    key = key_for(path)
    if key is not None:
        return key
    name = normal(path[-1])
    keys = _keys_named(name)
    section = (section_for(str(path[0])) or str(path[0])) if len(path) == 2 else ""
    if f"{section}.{name}" in keys:
        return f"{section}.{name}"
    return keys[0] if len(keys) == 1 else None


def _unknown_section(
    name: str, values: Mapping[str, Any], suffix: str, origin: Callable[[KeyPath], str]
) -> Iterator[Problem]:
    section = section_for(name)
    hint = f"rename it to {section}" if section else _did_you_mean((name,))
    yield Problem(name, f"unknown section{suffix}", hint)
    for key in values:
        path = (name, str(key))
        target = _our_key(path)
        if target is not None and target != f"{section}.{key}":
            location = origin(path)
            inner = f" ({location})" if location else ""
            advice = advice_for(path) or f"rename it to {target}"
            yield Problem(dotted(path), f"unknown key{inner}", advice)


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
            return f"add {dotted(path)}, e.g. {field.examples[0]}: {field.description}"
    return "one value is missing from the list" if isinstance(path[-1], int) else ""


def _did_you_mean(path: KeyPath) -> str:
    """The key to use: under the name that another project gives it, in another section, or spelled alike."""
    advice = advice_for(path)
    if advice:
        return advice
    target = _our_key(path)
    if target:
        return f"rename it to {target}"
    key = str(path[-1])
    parent = section_at(path[:-1])
    names = [name for name, _ in fields_of(parent)] if parent else []
    close = get_close_matches(key, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    elsewhere = _keys_named(key)
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known keys: {', '.join(names)}" if names else ""


def _keys_named(name: str) -> list[str]:
    """The dotted keys, of all sections, with this name."""
    return [
        f"{section}.{key}"
        for section, field in RunConfig.model_fields.items()
        for key, _ in fields_of(model_in(field.annotation))
        if key == name
    ]


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
