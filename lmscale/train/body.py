"""What stands in a checkpoint, and in an attempt, besides tensors: identity, placement, provenance, order."""

from collections.abc import Mapping
from typing import Any

from lmscale.config.identity import fingerprint, identity, placement
from lmscale.config.run import RunConfig
from lmscale.train.corpora import Corpora
from lmscale.train.environment import provenance
from lmscale.train.rank import Rank
from lmscale.train.state import TrainState


def run_identity(cfg: RunConfig, corpora: Corpora, *, streams: int) -> dict[str, Any]:
    """The run's identity, with the fingerprints of what it reads."""
    manifest = corpora.manifest
    found = identity(
        cfg,
        corpora=[manifest.fingerprint],
        tokenizer=manifest.tokenizer.fingerprint,
        streams=streams,
    )
    return dict(found)


def placement_facts(rank: Rank) -> dict[str, Any]:
    """How this start is laid out, for attempts/k.json."""
    mesh, cfg = rank.mesh, rank.cfg
    return {
        "world_size": mesh.world.size,
        "engine": cfg.engine.kind,
        "zero_stage": cfg.engine.zero_stage if cfg.engine.kind == "deepspeed" else None,
        "replicate": mesh.replicate_size if cfg.engine.kind == "fsdp" else mesh.dp_size,
        "shard": mesh.shard_size if cfg.engine.kind == "fsdp" else 1,
        "tp": mesh.tp_size,
        "sequence_parallel": cfg.parallel.sequence_parallel,
        "micro_batch": cfg.train.micro_batch,
    }


def checkpoint_body(rank: Rank, same: Mapping[str, Any], state: TrainState) -> dict[str, Any]:
    """What stands in every checkpoint of this attempt besides tensors and the moving state."""
    cfg = rank.cfg
    config = cfg.model_dump(mode="json", by_alias=True)
    order = {
        "version": 1,
        "seq_len": cfg.train.seq_len,
        "streams": state.streams,
        "shuffle_window": cfg.data.shuffle_window,
        "mix_block": cfg.data.mix_block,
    }
    return {
        "identity": dict(same),
        "fingerprints": {"identity": fingerprint(same), "placement": fingerprint(placement(cfg))},
        "config": config,
        "provenance": provenance(config, rank.mesh.world),
        "state": {"seed": cfg.train.seed, "order": order},
    }
