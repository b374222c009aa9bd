"""From a run file to a RunConfig and back: find, decode, override, validate, check and resolve.

`Draft` collects the tree of values with the file and line of every key, and all problems. Imports neither
numpy nor torch: a wrong run file is reported in a fraction of a second.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmscale.base.errors import ConfigError, Problem
from lmscale.config import rules
from lmscale.config.earlier_keys import is_stored, translate_config, translate_path
from lmscale.config.schema import SECTIONS, RunConfig
from lmscale.config.validation_messages import fields_of, in_words, renamed, section_at
from lmscale.config.yaml import KeyPath, dotted, parse, render

_FOLDERS = {"model": "models", "cluster": "clusters"}


def configs_dir() -> Path:
    """The folder configs/."""
    return _shipped("configs")


def cluster_dir() -> Path:
    """The folder cluster/, of templates."""
    return _shipped("cluster")


def section_folder(section: str) -> Path:
    """The folder in configs/ for named files of a section: models/, clusters/, else its name."""
    return configs_dir() / _FOLDERS.get(section, section)


def find_run(source: str | Path, *, cwd: Path) -> Path | None:
    """The run file: a path, else a name in configs/runs; `.yaml` may be left out."""
    return next(_files(str(source), (cwd, configs_dir() / "runs")), None)


def find_section(section: str, text: str, *, beside: Path, last: Sequence[Path]) -> list[Path]:
    """Files a section's text may mean: beside the run file, by name in configs/, then in `last`."""
    return list(_files(text, (beside, section_folder(section), configs_dir(), *last)))


def names(folder: Path) -> list[str]:
    """The names of the files in a folder of configs/."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _shipped(name: str) -> Path:
    """A folder of the project: inside an installed package, else of the checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_shipped" / name
    return inside if inside.is_dir() else package.parent / name


def _files(text: str, folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for name in (text, f"{text}.yaml"):
            path = folder / os.path.expanduser(name)
            if text and os.path.isfile(path):  # unlike Path.is_file it takes any text, however long
                yield path


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
            fact = f"{self._name(self.run_file)} is not a mapping of sections"
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
        """Whether the value at `path`, or a section that contains it, has been reported already."""
        return any(_texts(path[:end]) in self.broken for end in range(1, len(path) + 1))

    def origin(self, path: KeyPath) -> str:
        """File and line, or override, of the value at `path` or of the section that contains it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return ""

    def _set(self, path: KeyPath, value: Any, *, origin: str) -> None:
        container: Any = self.tree
        for depth, part in enumerate(path[:-1]):
            if isinstance(container, dict) and container.get(str(part)) is None:
                container[str(part)] = {}
            index = _index(container, part)
            if index is None or not isinstance(container[index], (dict, list)):
                here = dotted(path[: depth + 1])
                fact = f"has no keys that {origin!r} could change"
                self.problems.append(Problem(here, fact, f"set {here} as a whole"))
                return
            container = container[index]
        index = path[-1] if isinstance(container, dict) else _index(container, path[-1])
        if index is None:
            fact = f"the list has {len(container)} entries, from 0"
            self.problems.append(Problem(dotted(path), fact, f"set {dotted(path[:-1])} as a whole"))
            return
        container[index] = value
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
        location = self.origin((section,))
        skipped = []
        for path in find_section(section, value, beside=self.run_file.parent, last=last):
            decoded = self._decode(path, (section,))
            if isinstance(decoded, dict) and set(decoded) & set(SECTIONS):
                skipped.append(path)  # a run file of that name, e.g. this one
                continue
            if decoded is None or isinstance(decoded, dict):
                self.tree[section] = decoded or {}
            else:
                fact = f"{self._name(path)} is not a mapping of keys"
                self.problems.append(Problem(section, fact))
                self._break((section,))
            return
        self._missing(section, value, location=location, skipped=skipped)

    def _missing(self, section: str, value: str, *, location: str, skipped: Sequence[Path]) -> None:
        choices = names(section_folder(section))
        close = get_close_matches(value, choices, n=1)
        if close:
            hint = f"did you mean {close[0]!r}?"
        elif skipped:
            hint = f"{self._name(skipped[0])} contains whole sections, not the keys of one section"
        else:
            hint = (
                f"known names: {', '.join(choices)}" if choices else "write the keys here instead"
            )
        where = f"beside {self._name(self.run_file)} or in configs/"
        fact = f"found no file {value!r} {where} ({location})"
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
        lines = document.lines
        if not at and is_stored(path):
            document.value = translate_config(document.value)
            lines = {translate_path(key): line for key, line in lines.items()} | lines
        self.origins |= {(*at, *key): f"{name}:{line}" for key, line in lines.items()}
        return document.value

    def _break(self, path: KeyPath) -> None:
        """Note that `path` has been reported; the empty path stands for everything."""
        self.broken.update([_texts(path)] if path else [(section,) for section in SECTIONS])

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.cwd) if path.is_relative_to(self.cwd) else path)


def _texts(path: KeyPath) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _index(container: Any, part: str | int) -> Any:
    """The key or the list index that `part` means in `container`, or None."""
    if isinstance(container, dict):
        return part if part in container else None
    if isinstance(container, list) and str(part).isdecimal() and int(part) < len(container):
        return int(part)
    return None


def load(
    source: str | Path, overrides: Sequence[str] = (), *, cwd: Path | None = None
) -> RunConfig:
    """Read a run file, apply overrides `a.b=c` (later ones win), check it all, resolve its paths.

    `source` is a path or a name in configs/runs. Raises ConfigError with all problems.
    Loading the dumped result gives the same value from any folder.
    """
    cwd = Path.cwd() if cwd is None else cwd.absolute()
    run_file = find_run(source, cwd=cwd)
    if run_file is None:
        raise ConfigError([_no_run(source, cwd)])
    draft = Draft(run_file, cwd)
    draft.read()
    for text in overrides:
        draft.override(text)
    draft.settle()
    cfg, broken = _validate(draft)
    if cfg is not None:
        draft.problems += rules.problems(cfg, broken=broken)
    if draft.problems or cfg is None:
        raise ConfigError(dict.fromkeys(draft.problems))
    return _resolve(cfg, stem=run_file.stem, cwd=cwd)


def dump(cfg: RunConfig) -> str:
    """The whole run as YAML: all sections, all defaults; `load` reads it back to an equal value."""
    return render(cfg.model_dump(mode="json", by_alias=True))


def _no_run(source: str | Path, cwd: Path) -> Problem:
    if (cwd / source).is_dir():
        inside = cwd / source / "config.yaml"
        hint = f"did you mean {Path(source) / 'config.yaml'}?" if inside.is_file() else ""
        return Problem("", f"{source} is a folder, not a run file", hint)
    run_names = names(configs_dir() / "runs")
    close = get_close_matches(Path(source).stem, run_names, n=1)
    hint = (
        f"did you mean {close[0]!r}?" if close else f"names in configs/runs: {', '.join(run_names)}"
    )
    return Problem("", f"no run file {str(source)!r}, as a path or in configs/runs", hint)


def _validate(draft: Draft) -> tuple[RunConfig | None, set[str]]:
    """The config; after problems, one in which examples and defaults replace broken values.

    The set names the sections (`model`) and keys (`model.hidden_size`) that no check may use.
    """
    broken = {dotted(path[:2]) for path in draft.broken}
    try:
        return RunConfig.model_validate(draft.tree), broken
    except ValidationError as error:
        entries = error.errors(include_url=False)
    other_names = {key for entry in entries for key in renamed(entry)}
    for entry in entries:
        path: KeyPath = tuple(entry["loc"])
        present = entry["type"] == "missing" and (
            dotted(path) in other_names
            or any(k.startswith(f"{dotted(path)}.") for k in other_names)
        )
        if not present and not draft.is_broken(path):
            draft.problems += in_words(entry, origin=draft.origin)
        broken.add(dotted(path[:2]))
    broken |= other_names
    tree = _with_replacements(draft.tree, broken)
    try:
        return RunConfig.model_validate(tree), broken
    except (
        ValidationError
    ):  # the replacements are not sufficient: report without cross-field checks
        return None, broken


def _with_replacements(tree: dict[str, Any], broken: set[str]) -> dict[str, Any]:
    """The tree without broken keys, and with examples for required ones."""
    kept: dict[str, Any] = {}
    for section, _ in fields_of(RunConfig):
        values = tree.get(section)
        values = values if isinstance(values, dict) else {}
        whole = section not in broken
        kept[section] = {
            k: v for k, v in values.items() if whole and f"{section}.{k}" not in broken
        }
        for key, info in fields_of(section_at((section,))):
            if info.is_required() and key not in kept[section]:
                kept[section][key] = info.examples[0]
                broken.add(f"{section}.{key}")
    return kept


def _resolve(cfg: RunConfig, *, stem: str, cwd: Path) -> RunConfig:
    """Every path absolute, so that the result means the same from any folder."""

    def at(path: str | None) -> str | None:
        if path is None or "://" in path:
            return path
        return os.path.normpath(cwd / os.path.expanduser(path))

    corpora = tuple(c.model_copy(update={"path": at(c.path)}) for c in cfg.data.corpora)
    data = {
        "corpora": corpora,
        "tokenizer": at(cfg.data.tokenizer),
        "cache_dir": at(cfg.data.cache_dir),
    }
    resume = cfg.train.resume
    train = {
        "run_dir": at(cfg.train.run_dir or f"runs/{stem}"),
        "init_from": at(cfg.train.init_from),
        "resume": resume if resume in ("auto", "never") else at(resume),
    }
    held_out = {"corpora": tuple(at(path) for path in cfg.eval.corpora)}
    model: dict[str, Any] = {}
    if cfg.model.positions == "learned" and cfg.model.max_positions is None:
        model["max_positions"] = cfg.train.seq_len
    return cfg.model_copy(
        update={
            "model": cfg.model.model_copy(update=model),
            "data": cfg.data.model_copy(update=data),
            "train": cfg.train.model_copy(update=train),
            "eval": cfg.eval.model_copy(update=held_out),
        }
    )
