"""From a run file to a RunConfig and back: find, decode, override, validate, check, resolve.

Imports neither numpy nor torch: a wrong config is reported in a fraction of a second.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmscale.config import checks
from lmscale.config.draft import Draft
from lmscale.config.places import configs_dir, find_run, names
from lmscale.config.run import RunConfig
from lmscale.config.words import fields_of, in_words, section_at
from lmscale.config.yaml_core import KeyPath, dotted, render
from lmscale.errors import ConfigError, Problem


def load(
    source: str | Path, overrides: Sequence[str] = (), *, cwd: Path | None = None
) -> RunConfig:
    """Read a run file, apply overrides `a.b=c` (later ones win), check it all, resolve its paths.

    `source` is a path or a name in configs/runs. Raises ConfigError with every problem there is.
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
        draft.problems += checks.problems(cfg, broken=broken)
    if draft.problems or cfg is None:
        raise ConfigError(dict.fromkeys(draft.problems))
    return _resolve(cfg, stem=run_file.stem, cwd=cwd)


def dump(cfg: RunConfig) -> str:
    """The whole run as YAML: all sections, all defaults; `load` reads it back to an equal value."""
    return render(cfg.model_dump(mode="json", by_alias=True))


def _no_run(source: str | Path, cwd: Path) -> Problem:
    from difflib import get_close_matches

    if (cwd / source).is_dir():
        inside = cwd / source / "config.yaml"
        hint = f"did you mean {Path(source) / 'config.yaml'}?" if inside.is_file() else ""
        return Problem("", f"{source} is a folder, not a run file", hint)
    known = names(configs_dir() / "runs")
    close = get_close_matches(Path(source).stem, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"names in configs/runs: {', '.join(known)}"
    return Problem("", f"no run file {str(source)!r}, as a path or in configs/runs", hint)


def _validate(draft: Draft) -> tuple[RunConfig | None, set[str]]:
    """The config; or, after problems, one where examples and defaults stand in for broken values.

    The set names the sections (`model`) and keys (`model.width`) that no check should look at.
    """
    broken = {dotted(path[:2]) for path in draft.broken}
    try:
        return RunConfig.model_validate(draft.tree), broken
    except ValidationError as error:
        entries = error.errors(include_url=False)
    for entry in entries:
        path: KeyPath = tuple(entry["loc"])
        if not draft.is_broken(path):
            draft.problems.append(in_words(entry, origin=draft.origin))
        broken.add(dotted(path[:2]))
    tree = _stand_in(draft.tree, broken)
    try:
        return RunConfig.model_validate(tree), broken
    except ValidationError:  # the stand-ins do not cover it: report without cross-field checks
        return None, broken


def _stand_in(tree: dict[str, Any], broken: set[str]) -> dict[str, Any]:
    """The tree without broken keys, and with examples for required ones."""
    kept: dict[str, Any] = {}
    for section, _ in fields_of(RunConfig):
        values = tree.get(section)
        values = values if isinstance(values, dict) else {}
        whole = section not in broken
        kept[section] = {
            k: v for k, v in values.items() if whole and f"{section}.{k}" not in broken
        }
        for key, field in fields_of(section_at((section,))):
            if field.is_required() and key not in kept[section]:
                kept[section][key] = field.examples[0]
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
