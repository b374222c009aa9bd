"""A run file on its way to a RunConfig: a tree of plain values that knows where each came from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lmscale.config.places import find_section, names, section_folder
from lmscale.config.run import SECTIONS
from lmscale.config.yaml_core import KeyPath, dotted, parse
from lmscale.errors import Problem


@dataclass
class Draft:
    """Filled by `read`, then changed by `override`; problems are collected, never raised."""

    run_file: Path
    cwd: Path
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)  # "smoke.yaml:12" or an override
    problems: list[Problem] = field(default_factory=list)
    broken: set[tuple[str, ...]] = field(default_factory=set)  # already reported

    def read(self) -> None:
        """Decode the run file."""
        value = self._decode(self.run_file, ())
        if isinstance(value, dict):
            self.tree = value
        elif value is not None:
            fact = f"{self._name(self.run_file)} holds no mapping of sections"
            self.problems.append(Problem("", fact))
            self._break(())

    def override(self, text: str) -> None:
        """Apply one `a.b=value`; the value is YAML, and a section's may name a file."""
        key, equals, value_text = text.partition("=")
        path: KeyPath = tuple(key.strip().split("."))
        if not equals or not all(path):
            hint = "write section.key=value, e.g. train.steps=100"
            self.problems.append(Problem("", f"cannot read the override {text!r}", hint))
            return
        document = parse(value_text, name="override")
        if document.problems:
            facts = "; ".join(problem.fact for problem in document.problems)
            hint = f"quote the value, inside the shell's quotes: '{key}=\"...\"'"
            fact = f"cannot read {value_text!r}: {facts}"
            self.problems.append(Problem(dotted(path), fact, hint))
            self._break(path)
            return
        if len(path) > 1:
            self._settle(str(path[0]))
        self._set(path, document.value, origin=f"override {text}")
        if len(path) == 1:
            self._settle(str(path[0]), last=(self.cwd,))

    def settle(self) -> None:
        """Read the files that text sections name; last, because overrides may replace the text."""
        for section in SECTIONS:
            self._settle(section)

    def is_broken(self, path: KeyPath) -> bool:
        """Whether the value at `path`, or what holds it, has been reported already."""
        return any(_texts(path[:end]) in self.broken for end in range(1, len(path) + 1))

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path`, or what holds it, was written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return ""

    def _set(self, path: KeyPath, value: Any, *, origin: str) -> None:
        holder: Any = self.tree
        for depth, part in enumerate(path[:-1]):
            if isinstance(holder, dict) and holder.get(str(part)) is None:
                holder[str(part)] = {}
            index = _index(holder, part)
            if index is None or not isinstance(holder[index], (dict, list)):
                here = dotted(path[: depth + 1])
                fact = f"holds no keys that {origin!r} could change"
                self.problems.append(Problem(here, fact, f"set {here} as a whole"))
                return
            holder = holder[index]
        index = path[-1] if isinstance(holder, dict) else _index(holder, path[-1])
        if index is None:
            fact = f"the list has {len(holder)} entries, from 0"
            self.problems.append(Problem(dotted(path), fact, f"set {dotted(path[:-1])} as a whole"))
            return
        holder[index] = value
        self.origins = {at: o for at, o in self.origins.items() if at[: len(path)] != path}
        self.origins[path] = origin

    def _settle(self, section: str, *, last: Sequence[Path] = ()) -> None:
        """Make a section a mapping: a text is read from the file it names, null is empty."""
        if section not in SECTIONS:
            return
        value = self.tree.get(section)
        if value is None:
            self.tree[section] = {}
        if not isinstance(value, str):
            return
        self.tree[section] = {}
        place = self.origin((section,))
        passed_over = []
        for path in find_section(section, value, beside=self.run_file.parent, last=last):
            decoded = self._decode(path, (section,))
            if isinstance(decoded, dict) and set(decoded) & set(SECTIONS):
                passed_over.append(path)  # a run file of that name, e.g. this one
                continue
            if decoded is None or isinstance(decoded, dict):
                self.tree[section] = decoded or {}
            else:
                fact = f"{self._name(path)} holds no mapping of keys"
                self.problems.append(Problem(section, fact))
                self._break((section,))
            return
        self._missing(section, value, place=place, passed_over=passed_over)

    def _missing(
        self, section: str, value: str, *, place: str, passed_over: Sequence[Path]
    ) -> None:
        known = names(section_folder(section))
        close = get_close_matches(value, known, n=1)
        if close:
            hint = f"did you mean {close[0]!r}?"
        elif passed_over:
            hint = f"{self._name(passed_over[0])} holds whole sections, not the keys of one"
        else:
            hint = f"known names: {', '.join(known)}" if known else "write the keys here instead"
        where = f"beside {self._name(self.run_file)} or in configs/"
        fact = f"found no file {value!r} {where} ({place})"
        self.problems.append(Problem(section, fact, hint))
        self._break((section,))

    def _decode(self, path: Path, at: KeyPath) -> Any:
        name = self._name(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            self.problems.append(Problem(dotted(at), f"cannot read {name}: {reason}"))
            self._break(at)
            return None
        document = parse(text, name=name)
        for problem in document.problems:
            inside = tuple(problem.path.split(".")) if problem.path else ()
            full = (*at, *inside)
            self.problems.append(Problem(dotted(full), problem.fact, problem.hint))
            self._break(full)
        self.origins = {key: o for key, o in self.origins.items() if not at or key[:1] != at}
        self.origins |= {(*at, *key): f"{name}:{line}" for key, line in document.lines.items()}
        return document.value

    def _break(self, path: KeyPath) -> None:
        """Note that `path` has been reported; the empty path stands for everything."""
        self.broken.update([_texts(path)] if path else [(section,) for section in SECTIONS])

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.cwd) if path.is_relative_to(self.cwd) else path)


def _texts(path: KeyPath) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _index(holder: Any, part: str | int) -> Any:
    """The key or the list index that `part` means in `holder`, or None."""
    if isinstance(holder, dict):
        return part if part in holder else None
    if isinstance(holder, list) and str(part).isdecimal() and int(part) < len(holder):
        return int(part)
    return None
