"""May a run continue from a checkpoint? Finished, or changed in its identity, as far as folder and run file show."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lmscale.base.errors import ConfigError, Problem
from lmscale.checks.corpus_checks import corpus_samples
from lmscale.config.earlier_keys import translate_manifest
from lmscale.config.identity import ORDER_KEYS, differing, identity, total_steps
from lmscale.config.schema import RunConfig
from lmscale.run_folder.checkpoints import CheckpointEntry, newest_valid, read_manifest
from lmscale.run_folder.paths import RunFolder, checkpoint_name

# Their values are fingerprints of corpora, which the ranks compare when they have opened them.
_KNOWN_TO_RANKS = ("data.corpora", "data.tokenizer", "data.streams")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The body that a checkpoint was saved with, and its format, step and attempt; with the key names of today.

    Raises CheckpointError for a damaged manifest. Not collective.
    """
    manifest = read_manifest(path)
    body = {key: value for key, value in manifest.items() if key not in ("files", "tensors")}
    return translate_manifest(body)


def finished_step(cfg: RunConfig, folder: RunFolder) -> int | None:
    """The step of the checkpoint that completes the run; None where the run is not complete.

    Also None where the identity differs: the ranks know the corpora, so they report the keys.
    """
    checkpoint = None if cfg.train.resume == "never" else newest_valid(folder)
    if checkpoint is None:
        return None
    body = read_checkpoint(checkpoint.path)
    if identity_changes(cfg, body):
        return None
    train = body.get("state", {}).get("train", {})
    position = train.get("position", checkpoint.step * cfg.train.global_batch_size)
    samples = partial(corpus_samples, cfg)
    total = total_steps(cfg, samples, step=checkpoint.step, position=position)
    return checkpoint.step if checkpoint.step >= total else None


def finished_message(folder: RunFolder, step: int) -> str:
    """The message for a run that is finished already."""
    return (
        f"finished: {folder.path} has reached its last step, {step}. Its report: {folder.report}. "
        "To train on, raise train.steps with train.allow_change='[train.steps]'"
    )


def resume_problems(cfg: RunConfig, checkpoint: CheckpointEntry) -> list[Problem]:
    """The keys that a resume from this checkpoint may not change, but that differ.

    The contents of corpora and tokenizer are not compared here: the ranks compare their fingerprints.
    """
    return list(
        _problems(
            identity_changes(cfg, body := read_checkpoint(checkpoint.path)), body, _identity(cfg)
        )
    )


def identity_changes(cfg: RunConfig, body: Mapping[str, Any]) -> list[str]:
    """The identity keys that differ from a checkpoint's body and that train.allow_change does not list."""
    unknown = dict.fromkeys(_KNOWN_TO_RANKS)
    keys = differing({**body.get("identity", {}), **unknown}, {**_identity(cfg), **unknown})
    return [key for key in keys if key not in cfg.train.allow_change]


def check_identity(cfg: RunConfig, body: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys of the identity `now` that differ from a checkpoint's body and are allowed to.

    Raises ConfigError with every key that train.allow_change does not list.
    """
    changed = differing(body["identity"], now)
    refused = [key for key in changed if key not in cfg.train.allow_change]
    if refused:
        raise ConfigError(_problems(refused, body, now))
    return changed


def identity_problem(key: str, *, now: object, before: object, checkpoint: str) -> Problem:
    """The problem of an identity key that a resume would change."""
    fact = f"{now!r}, but {checkpoint} was trained with {before!r}"
    allow = "" if key in ORDER_KEYS else f", or allow the change with train.allow_change='[{key}]'"
    return Problem(key, fact, f"set it back{allow}, or choose another train.run_dir")


def _problems(
    keys: list[str], body: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[Problem]:
    checkpoint = checkpoint_name(body["step"], body["attempt"])
    before = body.get("identity", {})
    for key in keys:
        yield identity_problem(key, now=now.get(key), before=before.get(key), checkpoint=checkpoint)


def _identity(cfg: RunConfig) -> dict[str, Any]:
    return identity(cfg, corpora=[""] * len(cfg.data.corpora), tokenizer="", streams=0)
