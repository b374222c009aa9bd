"""YAML with the scalars of the 1.2 core schema, read with line numbers, written to read back.

PyYAML follows YAML 1.1, where `1e-3` is text, `on` is true, `010` is 8 and `1:30` is 90.
"""

import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from lmscale.base.errors import Problem

try:
    from yaml import CSafeLoader as _Parser  # ten times faster on a run file
except ImportError:  # a PyYAML built without libyaml
    from yaml import SafeLoader as _Parser  # type: ignore[assignment]

KeyPath = tuple[str | int, ...]

_PREFIX = "tag:yaml.org,2002:"
# https://yaml.org/spec/1.2.2/#1032-tag-resolution, in its order
_CORE = (
    ("null", re.compile(r"^(?:null|Null|NULL|~|)$"), ("n", "N", "~", "")),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), tuple("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), tuple("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        tuple("-+.0123456789"),
    ),
)
_MAX_NODES = 100_000  # aliases can make a small file unfold without end


class _CoreLoader(_Parser):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's way of declaring them


for _name, _pattern, _first in _CORE:
    _CoreLoader.add_implicit_resolver(_PREFIX + _name, _pattern, _first)


@dataclass
class Document:
    """A decoded text: its value, the line of each key, and what was wrong with it."""

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def dotted(path: KeyPath) -> str:
    """The path as users write it: data.corpora.0.path."""
    return ".".join(str(part) for part in path)


def parse(text: str, *, name: str) -> Document:
    """Decode one document. Never raises: `problems` says what is wrong, with `name` and line."""
    document = Document(None)
    loader = None
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        document.problems.append(Problem("", f"{where}: not YAML: {error.problem}", _advice(error)))
    except yaml.YAMLError as error:
        document.problems.append(Problem("", f"{name}: not YAML: {str(error).splitlines()[0]}"))
    else:
        if node is not None:
            _read(node, document, name=name)
    finally:
        if loader is not None:
            loader.dispose()
    return document


def _read(node: yaml.Node, document: Document, *, name: str) -> None:
    try:
        document.value = _Reader(name, document).value(node, ())
    except _UnfoldsWithoutEnd:
        fact = f"{name}: its aliases unfold to more than {_MAX_NODES} values"
        document.problems = [Problem("", fact, "write them out")]


class _UnfoldsWithoutEnd(Exception):
    pass


def _advice(error: yaml.MarkedYAMLError) -> str:
    text = f"{error.problem}"
    if "\\t" in text or "tab" in text:
        return "indent with spaces"
    if "mapping values" in text:
        return "put a text that contains ': ' in quotes"
    return "check quotes, brackets and indentation there"


class _Reader:
    """Turns nodes into values and notes what the core schema or we do not allow."""

    def __init__(self, name: str, document: Document) -> None:
        self.name = name
        self.document = document
        self.nodes = 0
        self.open: set[int] = set()  # nodes being read, to see an alias inside its own anchor

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise _UnfoldsWithoutEnd
        if id(node) in self.open:
            return self.problem(node, path, "an alias inside its own anchor", "write it out")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
            return self.scalar(node, path)
        finally:
            self.open.remove(id(node))

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _PREFIX + "str":
                shown = getattr(key_node, "value", "")
                shown = shown if isinstance(shown, str) else "a list or mapping"
                self.problem(key_node, path, f"the key {shown} is not text", "put it in quotes")
                continue
            key = key_node.value
            here = (*path, key)
            if key in first:
                fact = f"repeated key, first on line {first[key]}"
                self.problem(key_node, here, fact, "keep one of them")
                continue
            first[key] = line
            self.document.lines[here] = line
            values[key] = self.value(value_node, here)
        return values

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix(_PREFIX), node.value
        try:
            match kind:
                case "str" | "!":
                    return text
                case "null":
                    return None
                case "bool":
                    return _BOOLS[text.lower()]
                case "int":
                    return _integer(text)
                case "float":
                    return _float(text)
        except (
            ValueError,
            KeyError,
        ):  # an explicit tag on a text that is not of its kind, or a huge number
            return self.problem(node, path, f"cannot read {text[:40]!r} as {_KINDS[kind]}", "")
        return self.problem(node, path, f"unknown tag {node.tag}", "write the value without a tag")

    def problem(self, node: yaml.Node, path: KeyPath, fact: str, hint: str) -> None:
        where = f"{self.name}:{node.start_mark.line + 1}"
        self.document.problems.append(Problem(dotted(path), f"{fact} ({where})", hint))


_BOOLS = {"true": True, "false": False}
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number"}


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(text: str) -> float:
    plain = text.lower()
    if plain.endswith(".inf"):
        return -math.inf if plain.startswith("-") else math.inf
    return math.nan if plain == ".nan" else float(plain)


class _CoreDumper(yaml.SafeDumper):
    """Block style, flat lists on one line; quotes where YAML 1.1 or 1.2 sees no text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "'" if any(pattern.match(text) for _, pattern, _ in _CORE) else None
    if not text.replace(
        "\n", ""
    ).isprintable():  # line breaks of Unicode are folded without escapes
        style = '"'
    return dumper.represent_scalar(_PREFIX + "str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, values: Any) -> yaml.Node:
    flat = not any(isinstance(value, (dict, list, tuple)) for value in values)
    return dumper.represent_sequence(_PREFIX + "seq", values, flow_style=flat)


_CoreDumper.add_representer(str, _represent_text)
_CoreDumper.add_representer(list, _represent_list)


def render(value: Any) -> str:
    """The value as YAML: parse(render(value)).value equals it, for anything JSON can hold."""
    text = yaml.dump(
        value,
        Dumper=_CoreDumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=math.inf,
    )
    assert isinstance(text, str)
    return text
