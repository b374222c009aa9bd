"""Identity and placement: what a resume must keep and what it may change. The length of a run in steps."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from lmscale.config.fields import Kind, key_of, kind_of
from lmscale.config.schema import RunConfig


def total_steps(
    cfg: RunConfig, num_samples: Callable[[], int], *, step: int = 0, position: int = 0
) -> int:
    """Optimizer steps of the whole run, rounded up to whole steps.

    `num_samples`: of the training corpus, called for epochs only. `step` and `position` (samples
    consumed): the progress of the run; they matter where train.global_batch_size has changed before.
    """
    if cfg.train.steps is not None:
        return cfg.train.steps
    if cfg.train.tokens is not None:
        samples: float = -(-cfg.train.tokens // cfg.train.seq_len)
    else:
        assert cfg.train.epochs is not None, "the run file was checked to have one of the three"
        samples = cfg.train.epochs * num_samples()
    left = max(0, int(-(-(samples - position) // cfg.train.global_batch_size)))
    return max(1, step + left)


def kinds() -> dict[str, Kind]:
    """Every key of a run file, dotted, with its kind."""
    kind_by_key: dict[str, Kind] = {}
    for section, declared in RunConfig.model_fields.items():
        model = declared.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        for name, field in model.model_fields.items():
            kind_by_key[f"{section}.{key_of(name, field)}"] = kind_of(field)
    return kind_by_key


# They decide the sample at each position: another value would repeat and lose samples.
ORDER_KEYS = frozenset(
    {
        "train.seq_len",
        "train.seed",
        "data.corpora",
        "data.tokenizer",
        "data.streams",
        "data.shuffle_window_chunks",
        "data.mix_block",
    }
)


def identity(
    cfg: RunConfig, *, corpora: Sequence[str], tokenizer: str, streams: int
) -> dict[str, Any]:
    """The identity keys and their values, flat.

    `corpora` are the corpora's fingerprints in the order of data.corpora, `tokenizer` the
    tokenizer's; `streams` is data.streams with its default resolved. The paths of the files are placement, their
    contents identity.
    """
    assert len(corpora) == len(cfg.data.corpora), "one fingerprint per corpus"
    weights = [corpus.weight for corpus in cfg.data.corpora]
    resolved = {
        "data.corpora": [list(pair) for pair in zip(corpora, weights, strict=True)],
        "data.tokenizer": tokenizer,
        "data.streams": streams,
    }
    return _select(cfg, "identity") | resolved


def placement(cfg: RunConfig) -> dict[str, Any]:
    """The placement keys and their values, flat, with the paths of corpora and tokenizer."""
    paths = {
        "data.corpora": [corpus.path for corpus in cfg.data.corpora],
        "data.tokenizer": cfg.data.tokenizer,
    }
    return _select(cfg, "placement") | paths


def _select(cfg: RunConfig, kind: Kind) -> dict[str, Any]:
    tree = cfg.model_dump(mode="json", by_alias=True)
    wanted = (dotted.split(".") for dotted, key_kind in kinds().items() if key_kind == kind)
    return {f"{section}.{key}": tree[section][key] for section, key in wanted}


def fingerprint(mapping: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON, in hex: equal for equal mappings on any machine."""
    text = json.dumps(
        mapping, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys with another value, or missing on one side; sorted."""
    absent = object()
    keys = old.keys() | new.keys()
    return sorted(key for key in keys if old.get(key, absent) != new.get(key, absent))
