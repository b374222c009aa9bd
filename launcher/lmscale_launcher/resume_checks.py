"""How many samples a run file's corpus has, without torch: what the length of a run in epochs needs.

May a run go on? Finished, changed or missing, as far as folder and run file tell without torch.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lmscale.base.errors import Problem
from lmscale.config.identity import total_steps
from lmscale.config.schema import RunConfig
from lmscale.run_folder.checkpoints import CheckpointEntry, newest_valid
from lmscale.run_folder.paths import RunFolder


def corpus_samples(cfg: RunConfig) -> int:
    """Samples of the training corpus. Raises DataError."""
    from lmscale.corpus.manifest import load_part

    _, manifest = load_part(Path(cfg.data.corpora[0].path))
    return manifest.num_samples(cfg.train.seq_len)


def finished(cfg: RunConfig, folder: RunFolder) -> int | None:
    """The step of the checkpoint that completes the run, if there is one of the same identity.

    With another identity the ranks shall judge: they know the corpora, and name the keys.
    """
    if cfg.train.resume == "never" or (found := newest_valid(folder)) is None:
        return None
    if _changed(cfg, body := _manifest(found)):
        return None
    position = _stands(body).get("position", found.step * cfg.train.global_batch_size)
    total = total_steps(cfg, partial(corpus_samples, cfg), step=found.step, position=position)
    return found.step if found.step >= total else None


def changes(cfg: RunConfig, found: CheckpointEntry) -> list[Problem]:
    """Keys that may not change when a run goes on from this checkpoint, but differ.

    What corpora and tokenizer hold is not looked at: the ranks compare their fingerprints.
    """
    from lmscale.config.identity import ORDER_KEYS

    body = _manifest(found)
    before, now = body.get("identity", {}), _identity(cfg)

    def problem(key: str) -> Problem:
        fact = f"{now.get(key)!r}, but {found.path.name} was trained with {before.get(key)!r}"
        allow = f", or allow it with train.allow_change='[{key}]'" if key not in ORDER_KEYS else ""
        return Problem(key, fact, f"set it back{allow}, or choose another train.run_dir")

    return [problem(key) for key in _changed(cfg, body)]


def missing(cfg: RunConfig) -> Iterator[Problem]:
    """Corpora that are not there, each with the command that makes it."""
    paths = {f"data.corpora[{i}].path": corpus.path for i, corpus in enumerate(cfg.data.corpora)}
    paths |= {f"eval.corpora[{i}]": path for i, path in enumerate(cfg.eval.corpora)}
    for key, path in paths.items():
        if not Path(path).exists():
            hint = f"make it with: lmscale prepare {path} INPUT..."
            yield Problem(key, f"{path} does not exist", hint)


def farewell(folder: RunFolder, step: int) -> str:
    """What to say of a finished run."""
    return (
        f"finished: {folder.path} stands at its last step, {step}. Its report: {folder.report}. "
        "To train on, raise train.steps with train.allow_change='[train.steps]'"
    )


def _changed(cfg: RunConfig, body: dict[str, Any]) -> list[str]:
    from lmscale.config.identity import differing

    blank = {"data.corpora": None, "data.tokenizer": None, "data.streams": None}
    keys = differing({**body.get("identity", {}), **blank}, {**_identity(cfg), **blank})
    return [key for key in keys if key not in cfg.train.allow_change]


def _identity(cfg: RunConfig) -> dict[str, Any]:
    from lmscale.config.identity import identity

    return identity(cfg, corpora=[""] * len(cfg.data.corpora), tokenizer="", streams=0)


def _manifest(found: CheckpointEntry) -> dict[str, Any]:
    from lmscale.run_folder.checkpoints import read_manifest

    return dict(read_manifest(found.path))


def _stands(body: dict[str, Any]) -> dict[str, Any]:
    return dict(body.get("state", {}).get("train", {}))
