"""The configuration reference: every key with type, default, kind, meaning and example, from the schema.

docs/configuration.md is the output of `python -m lmscale.config.reference`; `lmscale config [KEY]` prints
`reference_text`.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lmscale.base.errors import ConfigError, Problem
from lmscale.config.aliases import advice_for
from lmscale.config.fields import kind_of
from lmscale.config.json_schema import json_schema
from lmscale.config.schema import RunConfig
from lmscale.config.validation_messages import fields_of, model_in

_INTRODUCTION = """\
# Configuration reference

All keys of a run file. This page is generated from the schema (lmscale/config/schema.py) by
`python -m lmscale.config.reference > docs/configuration.md`; do not edit it. `lmscale config KEY` prints the entry of a
key. Any key can be set on the command line: `lmscale train RUN.yaml optim.lr=1e-3`.

- **Kind** is *identity* for keys that define what is trained: a resume with another value is refused unless
  `train.allow_change` lists the key. Keys of kind *placement* define where and how the run computes, and may change at
  any start.
- **Default** is *required* for keys that a run file must contain.
- Numbers of bytes, counts and times may be text with a unit: `"1 GiB"`, `"20B"`, `"2h"`.
- A run file that lmscale has stored in a run folder (RUN/config.yaml, RUN/jobs/K.yaml) may have the key names of an
  earlier version: `lmscale train RUN/config.yaml` and `lmscale resume RUN` read it. In all other run files these names
  are refused with the key to use.
"""


@dataclass(frozen=True, slots=True)
class KeyReference:
    """One key of a run file."""

    key: str  # dotted; entries of a list have [] in their path
    type: str
    default: str
    kind: str
    meaning: str
    example: str


def key_references() -> Iterator[tuple[str, str, list[KeyReference]]]:
    """Each section with its meaning and its keys, in the order of the run file."""
    definitions = json_schema()["$defs"]
    for section, declared in fields_of(RunConfig):
        model = model_in(declared.annotation)
        assert model is not None
        yield section, _summary(model), list(_keys(section, model, definitions))


def page() -> str:
    """The contents of docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section, summary, keys in key_references():
        parts.append(
            f"\n## {section}\n\n{summary}\n\n| key | type | default | kind | meaning | example |\n"
        )
        parts.append("|---|---|---|---|---|---|\n")
        for entry in keys:
            cells = (
                f"`{entry.key}`", entry.type, entry.default, entry.kind, entry.meaning, f"`{entry.example}`",
            )  # fmt: skip
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def reference_text(key: str | None = None) -> str:
    """The entry of a key, the keys of a section, or all keys, as plain text that ends with a newline.

    Raises ConfigError for an unknown key, with the key that was probably meant.
    """
    entries = [entry for _, _, keys in key_references() for entry in keys]
    if key is None:
        return "".join(f"{_summary_line(entry)}\n" for entry in entries)
    text = "".join(_full_entry(entry) for entry in entries if entry.key == key)
    inside = (f"{key}.", f"{key}[].")
    text += "".join(
        _summary_line(entry) + "\n" for entry in entries if entry.key.startswith(inside)
    )
    if text:
        return text
    close = get_close_matches(key, [entry.key for entry in entries], n=1)
    spelling = f"did you mean {close[0]!r}?" if close else "lmscale config prints all keys"
    hint = advice_for(key.split(".")) or spelling
    raise ConfigError([Problem(key, "unknown key", hint)])


def _full_entry(entry: KeyReference) -> str:
    return (
        f"{entry.key}\n  {entry.meaning}\n  type:    {entry.type}\n  default: {entry.default}\n"
        f"  kind:    {entry.kind}\n  example: {entry.key}={entry.example}\n"
    )


def _summary_line(entry: KeyReference) -> str:
    return f"{entry.key}={entry.default}: {entry.meaning}"


def _keys(path: str, model: type[BaseModel], definitions: dict[str, Any]) -> Iterator[KeyReference]:
    properties = definitions[model.__name__]["properties"]
    for name, field in fields_of(model):
        key = f"{path}.{name}"
        inner = model_in(field.annotation)
        yield KeyReference(
            key,
            "section" if inner is not None and not _is_list(field) else _type(properties[name]),
            _default(field),
            kind_of(field),
            field.description or "",
            _example(field),
        )
        if inner is not None:
            yield from _keys(f"{key}[]" if _is_list(field) else key, inner, definitions)


def _is_list(field: FieldInfo) -> bool:
    return "tuple[" in str(field.annotation)


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(str(choice) for choice in schema.get("enum", [schema.get("const")]))
    types = schema.get("type")
    names = [types] if isinstance(types, str) else list(types or ())
    if not names:
        names = [_type(option) for option in schema.get("anyOf", ())]
    words = [_TYPE_NAMES.get(name, name) for name in names]
    return " or ".join(dict.fromkeys(words))


_TYPE_NAMES = {
    "integer": "whole number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "object": "mapping",
}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "the defaults of its keys"
    if field.default is None:
        return "null"
    return _flow(field.default)


def _example(field: FieldInfo) -> str:
    if field.examples:
        return _flow(field.examples[0])
    if field.default_factory is not None:
        return "{}"
    return _flow(field.default)


def _flow(value: object) -> str:
    """The value as YAML on one line: JSON, with plain texts where YAML reads them as text."""
    if isinstance(value, str):
        return (
            value
            if value.replace("_", "").replace("/", "").isalnum() and not value[0].isdigit()
            else json.dumps(value)
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(entry) for entry in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(value)


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.stdout.write(page())
