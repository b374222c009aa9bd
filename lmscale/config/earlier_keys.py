"""Keys of files that an earlier version of lmscale has stored, translated to the names of today.

Only readers of run folders and checkpoints use this module. A run file of a user is refused with the name to use
(aliases.py), so that a run file has one spelling. Commit 937e9f1 is the last one that wrote these names.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EARLIER_KEYS: Mapping[str, str] = {
    "model.layers": "model.num_layers",
    "model.width": "model.hidden_size",
    "model.heads": "model.num_heads",
    "model.kv_heads": "model.num_kv_heads",
    "model.feed_forward": "model.ffn_hidden_size",
    "model.tied": "model.tie_embeddings",
    "model.biases": "model.bias",
    "model.norm_place": "model.norm_order",
    "data.shuffle_window": "data.shuffle_window_chunks",
    "data.prefetch": "data.prefetch_steps",
    "parallel.replicate": "parallel.dp_replicate",
    "parallel.shard": "parallel.dp_shard",
    "optim.clip": "optim.max_grad_norm",
    "optim.max_skips": "optim.max_nonfinite_steps",
    "train.global_batch": "train.global_batch_size",
    "train.micro_batch": "train.micro_batch_size",
    "train.check_replicas_every": "train.replica_check_every_steps",
}
_JOB_CONFIG = re.compile(r"[1-9]\d*\.yaml")


def is_stored(path: Path) -> bool:
    """Whether lmscale has written this run file: RUN/config.yaml or RUN/jobs/K.yaml of a run folder."""
    folder = path.absolute().parent
    if folder.name == "jobs" and _JOB_CONFIG.fullmatch(path.name):
        return path.with_suffix(".json").is_file()
    return path.name == "config.yaml" and any(
        (folder / name).is_dir() for name in ("attempts", "events", "checkpoints")
    )


def translate_path(path: Sequence[str | int]) -> tuple[str | int, ...]:
    """A key path, such as ("model", "width", ...), with today's names."""
    dotted = ".".join(str(part) for part in path[:2])
    return (*EARLIER_KEYS.get(dotted, dotted).split("."), *path[2:]) if path else ()


def translate_config(tree: Any) -> Any:
    """The tree of a stored run file with today's keys; any other value is returned as it is."""
    if not isinstance(tree, Mapping):
        return tree
    translated = {
        section: _section(section, values) if isinstance(values, Mapping) else values
        for section, values in tree.items()
    }
    train = translated.get("train")
    if isinstance(train, dict) and isinstance(train.get("allow_change"), list | tuple):
        train["allow_change"] = [_key(key) for key in train["allow_change"]]
    return translated


def translate_manifest(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a checkpoint's manifest with today's keys in identity, config and journal.

    The fingerprint of the identity follows its keys. That of the placement is kept: it is only a record.
    """
    translated = dict(body)
    if isinstance(body.get("config"), Mapping):
        translated["config"] = translate_config(body["config"])
    before = body.get("identity")
    if isinstance(before, Mapping):
        translated["identity"] = {_key(key): value for key, value in before.items()}
        if isinstance(body.get("fingerprints"), Mapping) and translated["identity"] != before:
            from lmscale.config.identity import fingerprint

            identity = fingerprint(translated["identity"])
            translated["fingerprints"] = {**body["fingerprints"], "identity": identity}
    state = body.get("state")
    if isinstance(state, Mapping) and isinstance(state.get("train"), Mapping):
        train = state["train"]
        journal = [_journal_entry(entry) for entry in train.get("journal", ())]
        translated["state"] = {**state, "train": {**train, "journal": journal}}
    return translated


def _section(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    translated = {}
    for key, value in values.items():
        today = str(translate_path((section, key))[1])
        # A file that has both names was edited by a user: the earlier name stays, to be refused.
        translated[key if today in values else today] = value
    return translated


def _journal_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, "key": _key(entry["key"])}


def _key(key: str) -> str:
    return EARLIER_KEYS.get(key, key)
