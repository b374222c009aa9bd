"""YAML 1.2 for run files: values with the line of every key, all problems together, and output that reads back.

ruamel.yaml scans and emits. Its resolver accepts more than the core schema (`1_000`, `0b1` and dates are not text for
it), so the scalars follow the table of the specification here. The nodes are converted here, too: ruamel.yaml stops at
the first repeated key, whereas a user wants to see all problems of a file at once.
"""

import io
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import BaseResolver, implicit_resolvers

from lmscale.base.errors import Problem

KeyPath = tuple[str | int, ...]

_PREFIX = "tag:yaml.org,2002:"
# https://yaml.org/spec/1.2.2/#1032-tag-resolution, in its order: tag, pattern, possible first characters
_CORE_SCHEMA = (
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
_TYPE_NAMES = {"bool": "true or false", "int": "a whole number", "float": "a number"}
_MAX_NODES = 100_000  # a small file can expand to an endless number of values through aliases
_MAX_DEPTH = 100  # a run file has five levels; deeper ones would exhaust Python's stack


@dataclass
class Document:
    """A decoded text: its value, the line of each key (from 1), and its problems."""

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def dotted(path: KeyPath) -> str:
    """The path as users write it: data.corpora.0.path."""
    return ".".join(str(part) for part in path)


def parse(text: str, *, name: str) -> Document:
    """Decode one document. Never raises: `problems` names each mistake with `name` and its line."""
    document = Document(None)
    try:
        node = _parser().compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = f"{name}:{mark.line + 1}" if mark else name
        fact = f"{location}: not YAML: {error.problem or error.context}"
        document.problems.append(Problem("", fact, _hint(error)))
    except YAMLError as error:
        document.problems.append(Problem("", f"{name}: not YAML: {str(error).splitlines()[0]}"))
    else:
        if node is not None:
            _convert(node, document, name=name)
    return document


def render(value: Any) -> str:
    """The value as YAML: parse(render(value)).value equals it, for anything that JSON can represent."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _CoreRepresenter
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 1 << 30  # no line is folded
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue().removesuffix("...\n")  # a document that is a single scalar ends so


class _CoreResolver(BaseResolver):
    """The scalars of the YAML 1.2 core schema."""

    def __init__(self, version: Any = None, loader: Any = None) -> None:
        super().__init__(loader)

    @property
    def processing_version(self) -> tuple[int, int]:
        """The version whose grammar the parser follows."""
        return 1, 2


for _tag, _pattern, _first in _CORE_SCHEMA:
    _CoreResolver.add_implicit_resolver_base(_PREFIX + _tag, _pattern, _first)


def _parser() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _CoreResolver
    yaml.max_depth = _MAX_DEPTH
    yaml.composer.warn_double_anchors = False  # YAML 1.2 lets a later anchor replace an earlier one
    return yaml


def _hint(error: MarkedYAMLError) -> str:
    text = f"{error.problem}"
    if "\\t" in text or "tab" in text:
        return "indent with spaces"
    if "mapping values" in text:
        return "put a text that contains ': ' in quotes"
    return "check quotes, brackets and indentation there"


class _TooManyNodesError(Exception):
    pass


def _convert(node: Node, document: Document, *, name: str) -> None:
    try:
        document.value = _Converter(name, document).value(node, ())
    except _TooManyNodesError:
        fact = f"{name}: its aliases unfold to more than {_MAX_NODES} values"
        document.problems = [Problem("", fact, "write the values without aliases")]


class _Converter:
    """Turns nodes into values and records what the core schema or a run file does not allow."""

    def __init__(self, name: str, document: Document) -> None:
        self.name = name
        self.document = document
        self.num_nodes = 0
        self.open_nodes: set[int] = set()  # being converted: an alias to one of them is circular

    def value(self, node: Node, path: KeyPath) -> Any:
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            raise _TooManyNodesError
        if id(node) in self.open_nodes:
            return self.problem(node, path, "an alias inside its own anchor", "write the value out")
        self.open_nodes.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self.mapping(node, path)
            if isinstance(node, SequenceNode):
                return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
            return self.scalar(node, path)
        finally:
            self.open_nodes.remove(id(node))

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first_line: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode) or key_node.tag != _PREFIX + "str":
                key_text = key_node.value if isinstance(key_node, ScalarNode) else None
                shown = "a list or mapping" if key_text is None else key_text
                self.problem(key_node, path, f"the key {shown} is not text", "put it in quotes")
                continue
            key = key_node.value
            key_path = (*path, key)
            if key in first_line:
                fact = f"repeated key, first on line {first_line[key]}"
                self.problem(key_node, key_path, fact, "keep one of them")
                continue
            first_line[key] = line
            self.document.lines[key_path] = line
            values[key] = self.value(value_node, key_path)
        return values

    def scalar(self, node: Node, path: KeyPath) -> Any:
        tag, text = str(node.tag).removeprefix(_PREFIX), node.value
        try:
            match tag:
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
        except (ValueError, KeyError):  # a tag that does not fit its text, or a huge number
            fact = f"cannot read {text[:40]!r} as {_TYPE_NAMES[tag]}"
            return self.problem(node, path, fact, "")
        hint = "write the value without a tag"
        return self.problem(node, path, f"unknown tag {node.tag}", hint)

    def problem(self, node: Node, path: KeyPath, fact: str, hint: str) -> None:
        location = f"{self.name}:{node.start_mark.line + 1}"
        self.document.problems.append(Problem(dotted(path), f"{fact} ({location})", hint))


_BOOLS = {"true": True, "false": False}


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(text: str) -> float:
    lower = text.lower()
    if lower.endswith(".inf"):
        return -math.inf if lower.startswith("-") else math.inf
    return math.nan if lower == ".nan" else float(lower)


class _CoreRepresenter(SafeRepresenter):
    """Block style with flat lists on one line; quotes where YAML 1.1 or 1.2 would not read a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(representer: SafeRepresenter, text: str) -> Any:
    style = "'" if _is_other_scalar(text) else None
    if not text.replace("\n", "").isprintable():  # the other styles would fold these characters
        style = '"'
    return representer.represent_scalar(_PREFIX + "str", text, style=style)


def _is_other_scalar(text: str) -> bool:
    """Whether a reader of YAML 1.1 or 1.2 would read this plain text as another type."""
    core = any(pattern.match(text) for _, pattern, _ in _CORE_SCHEMA)
    return core or any(pattern.match(text) for _, _, pattern, _ in implicit_resolvers)


def _represent_list(representer: SafeRepresenter, values: Any) -> Any:
    is_flat = not any(isinstance(value, (dict, list, tuple)) for value in values)
    return representer.represent_sequence(_PREFIX + "seq", values, flow_style=is_flat)


_CoreRepresenter.add_representer(str, _represent_text)
_CoreRepresenter.add_representer(list, _represent_list)
