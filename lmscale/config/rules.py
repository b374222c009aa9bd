"""What no single key can show: conflicts between keys, and settings that are not implemented.

`problems` needs no number of ranks, `world_problems` does. Each check is listed in CHECKS with all keys that
it reads, so that it is left out where one of them is wrong already. A setting with a name but without an
implementation is refused with one that works; its line is deleted in the change that implements it. Whether a
possible combination has been tested is the subject of proven.py. Pure, without torch.
"""

from collections.abc import Callable, Collection, Iterator
from math import gcd

from lmscale.base.errors import Problem
from lmscale.base.units import parse_percent
from lmscale.config import proven
from lmscale.config.cluster_schema import CLUSTER_KINDS
from lmscale.config.engine_kinds import ENGINE_KINDS, kinds_that
from lmscale.config.schema import EngineConfig, RunConfig
from lmscale.modelspec.spec import VOCAB_MULTIPLE


def refusals(cfg: RunConfig) -> Iterator[Problem]:
    """Settings without an implementation: refused on the user's machine instead of in a queue or on a cluster."""
    yield from _data(cfg)
    yield from _rest(cfg)


def _not_yet(path: str, value: object, nearest: str) -> Problem:
    shown = str(value).lower() if isinstance(value, bool) else value
    return Problem(path, f"{shown} is not supported yet", nearest)


def _data(cfg: RunConfig) -> Iterator[Problem]:
    data = cfg.data
    if len(data.corpora) > 1:
        yield _not_yet(
            "data.corpora",
            f"training on {len(data.corpora)} corpora at once",
            "use one; `lmscale prepare OUT INPUT...` joins several inputs",
        )
    if data.on_damage == "mask":
        yield _not_yet("data.on_damage", "mask", "use fail; `lmscale verify` lists the damage")
    if data.max_damage_rate != type(data).model_fields["max_damage_rate"].default:
        nearest = "leave it out; with data.on_damage=fail the first damaged sample ends the run"
        yield _not_yet("data.max_damage_rate", data.max_damage_rate, nearest)
    remote = [("data.corpora", corpus.path) for corpus in data.corpora]
    remote += [("eval.corpora", path) for path in cfg.eval.corpora]
    for key, path in remote:
        if "://" in path:
            yield _not_yet(key, f"the remote corpus {path}", "copy it to a local or shared folder")


def _rest(cfg: RunConfig) -> Iterator[Problem]:
    if cfg.checkpoint.asynchronous:
        yield _not_yet("checkpoint.async", True, "use false")
    if cfg.train.init_from is not None:
        nearest = "use null; train.resume=CHECKPOINT continues with weights, moments and position"
        yield _not_yet("train.init_from", cfg.train.init_from, nearest)
    for tracker in cfg.log.trackers:
        if tracker != "tensorboard":
            yield _not_yet(
                "log.trackers",
                f"the tracker {tracker}",
                "use [tensorboard] or []; metrics.jsonl has every step",
            )
    yield from _cluster(cfg)


def _cluster(cfg: RunConfig) -> Iterator[Problem]:
    if cfg.cluster.kind not in CLUSTER_KINDS:
        hint = f"use one of {', '.join(CLUSTER_KINDS)}"
        yield _not_yet("cluster.kind", cfg.cluster.kind, hint)


Check = Callable[[RunConfig], Iterator[Problem]]

# fp16 starts at a scale of 2^16 and halves it at each overflow: up to 16 consecutive steps, and a reserve.
_FP16_SKIPS = 20
# The value of engine.zero_stage in a run file without the key.
_UNUSED_STAGE = EngineConfig.model_fields["zero_stage"].default


def _split_over_tp(cfg: RunConfig) -> Iterator[Problem]:
    tp, model = cfg.parallel.tp, cfg.model
    sizes = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        f"{VOCAB_MULTIPLE}, of which padded vocabularies are multiples": VOCAB_MULTIPLE,
    }
    most = gcd(*sizes.values())
    hint = f"this model splits over {most} ranks, or over a divisor of that"
    for name, size in sizes.items():
        if not size % tp:
            continue
        shown = f"{name} {size}" if name.startswith("model.") else name
        fact = f"{tp} does not divide {shown}"
        if name == "model.num_kv_heads" and size < tp:
            fact = f"{tp} ranks cannot share model.num_kv_heads {size}: each rank needs at least one kv head"
        yield Problem("parallel.tp", fact, hint if most > 1 else "use 1: this model does not split")


def _sequence_parallel(cfg: RunConfig) -> Iterator[Problem]:
    tp, length = cfg.parallel.tp, cfg.train.seq_len
    if not cfg.parallel.sequence_parallel:
        return
    if tp == 1:
        fact = "true, but parallel.tp is 1: there are no tp ranks to split the tokens over"
        yield Problem("parallel.sequence_parallel", fact, "use false, or parallel.tp above 1")
    elif length % tp:
        fact = f"true, but parallel.tp {tp} does not divide train.seq_len {length}"
        hint = f"use false, or train.seq_len={length - length % tp or tp}"
        yield Problem("parallel.sequence_parallel", fact, hint)


def _axes_of_the_engine(cfg: RunConfig) -> Iterator[Problem]:
    kind, sharding = cfg.engine.kind, kinds_that(shards_parameters=True)
    if cfg.engine.traits.shards_parameters:
        return
    for name, default in (("dp_shard", "auto"), ("dp_replicate", 1)):
        if getattr(cfg.parallel, name) != default:
            fact = (
                f"engine.kind {kind} uses all data-parallel ranks; only {sharding} reads this key"
            )
            hint = f"leave it at {default}, or set engine.kind={sharding}"
            yield Problem(f"parallel.{name}", fact, hint)


def _zero_stage(cfg: RunConfig) -> Iterator[Problem]:
    engine, staged = cfg.engine, kinds_that(uses_zero_stage=True)
    if not engine.traits.uses_zero_stage and engine.zero_stage != _UNUSED_STAGE:
        fact = (
            f"{engine.zero_stage}, but engine.kind is {engine.kind}; only {staged} reads this key"
        )
        yield Problem("engine.zero_stage", fact, f"leave it out, or set engine.kind={staged}")


def _reshard(cfg: RunConfig) -> Iterator[Problem]:
    if not cfg.engine.traits.shards_parameters and not cfg.engine.reshard_after_forward:
        sharding = kinds_that(shards_parameters=True)
        fact = f"engine.kind {cfg.engine.kind} does not read this key; only {sharding} does"
        hint = f"leave it at true, or set engine.kind={sharding}"
        yield Problem("engine.reshard_after_forward", fact, hint)


def _offload(cfg: RunConfig) -> Iterator[Problem]:
    traits, stage, offload = cfg.engine.traits, cfg.engine.zero_stage, cfg.engine.offload
    if offload not in traits.offloads:
        fact = traits.offload_limit
        if traits.offloads == ("none",):
            fact = f"{offload}, but {fact}"
        yield Problem("engine.offload", fact, traits.offload_hint)
    elif not traits.uses_zero_stage:
        return
    elif offload == "optimizer" and stage == 0:
        fact = "optimizer, but zero_stage 0 keeps a whole optimizer on each accelerator"
        yield Problem("engine.offload", fact, "use none, or engine.zero_stage 1, 2 or 3")
    elif offload in ("all", "nvme") and stage != 3:
        fact = f"{offload}, but zero_stage {stage} keeps whole weights on each accelerator"
        hint = "set engine.zero_stage=3" + (", or use optimizer" if stage else "")
        yield Problem("engine.offload", fact, hint)


def _precision(cfg: RunConfig) -> Iterator[Problem]:
    kind, precision, skips = cfg.engine.kind, cfg.engine.precision, cfg.optim.max_nonfinite_steps
    supported = precision in cfg.engine.traits.precisions
    able = [row.name for row in ENGINE_KINDS.values() if precision in row.precisions]
    if not supported and precision != "fp16":
        hint = f"use engine.kind={' or '.join(able)}"
        yield Problem("engine.precision", f"{kind} has no {precision}", hint)
    if precision != "fp16":
        return
    if not supported:
        fact = f"{kind} has no fp16: it needs a loss scale, which only {' or '.join(able)} has here"
        yield Problem("engine.precision", fact, f"use bf16, or engine.kind={' or '.join(able)}")
    elif skips < _FP16_SKIPS:
        fact = f"{skips}, but fp16 finds its loss scale by skipping steps that overflow"
        hint = (
            f"set at least {_FP16_SKIPS}, or use engine.precision=bf16, which needs no loss scale"
        )
        yield Problem("optim.max_nonfinite_steps", fact, hint)


def _compile(cfg: RunConfig) -> Iterator[Problem]:
    engine = cfg.engine
    if engine.traits.uses_zero_stage and engine.zero_stage == 3 and engine.compile:
        fact = "true, but zero_stage 3 gathers weights inside the blocks, which the compiler cannot"
        hint = "set it to false, or use engine.kind=fsdp, or engine.zero_stage=2"
        yield Problem("engine.compile", fact, hint)


# Each check with all the keys that it reads.
ENGINE_CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (
        ("parallel.tp", "model.num_heads", "model.num_kv_heads", "model.ffn_hidden_size"),
        _split_over_tp,
    ),
    (("parallel.tp", "parallel.sequence_parallel", "train.seq_len"), _sequence_parallel),
    (("engine.kind", "parallel.dp_shard", "parallel.dp_replicate"), _axes_of_the_engine),
    (("engine.kind", "engine.zero_stage"), _zero_stage),
    (("engine.kind", "engine.reshard_after_forward"), _reshard),
    (("engine.kind", "engine.zero_stage", "engine.offload"), _offload),
    (("engine.kind", "engine.precision", "optim.max_nonfinite_steps"), _precision),
    (("engine.kind", "engine.zero_stage", "engine.compile"), _compile),
)


def problems(cfg: RunConfig, *, broken: Collection[str] = ()) -> Iterator[Problem]:
    """Conflicts that any number of ranks would have.

    `broken` names keys whose values replace unreadable ones. Checks that read them are left out, so that
    all true problems of a file can be reported together.
    """
    for keys, check in CHECKS:
        if not any(_overlap(key, bad) for key in keys for bad in broken):
            yield from check(cfg)
    for problem in refusals(cfg):
        if not any(_overlap(problem.path, bad) for bad in broken):
            yield problem


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def world_problems(cfg: RunConfig, *, world_size: int) -> Iterator[Problem]:
    """Conflicts with a number of ranks; call it as soon as the number is known."""
    tp = cfg.parallel.tp
    if world_size % tp:
        fact = f"{tp} does not divide {world_size} ranks"
        yield Problem("parallel.tp", fact, f"start a multiple of {tp} ranks")
        return
    data_ranks = world_size // tp
    yield from _mesh(cfg, data_ranks)
    if cfg.train.global_batch_size < data_ranks:
        fact = f"{cfg.train.global_batch_size} samples cannot feed {data_ranks} data-parallel ranks"
        yield Problem(
            "train.global_batch_size", fact, f"set at least {data_ranks}, or start fewer ranks"
        )


def _mesh(cfg: RunConfig, data_ranks: int) -> Iterator[Problem]:
    replicate, shard = cfg.parallel.dp_replicate, cfg.parallel.dp_shard
    if shard == "auto":
        if data_ranks % replicate:
            fact = f"{replicate} does not divide {data_ranks} data-parallel ranks"
            yield Problem("parallel.dp_replicate", fact, "choose a divisor of them")
    elif replicate * shard != data_ranks:
        fact = f"replicate {replicate} x shard {shard} is not {data_ranks}, the number of data-parallel ranks"
        yield Problem("parallel.dp_shard", fact, "write auto, or start that many ranks")


def shard_size(cfg: RunConfig, *, world_size: int) -> int:
    """The number that `parallel.dp_shard: auto` stands for. Call world_problems first."""
    if cfg.parallel.dp_shard != "auto":
        return cfg.parallel.dp_shard
    return world_size // (cfg.parallel.tp * cfg.parallel.dp_replicate)


def _single_length(cfg: RunConfig) -> Iterator[Problem]:
    given = [k for k in ("steps", "tokens", "epochs") if getattr(cfg.train, k) is not None]
    if not given:
        hint = 'add one of train.steps, train.tokens (e.g. "20B") or train.epochs'
        yield Problem("train.steps", "the length of the run is missing", hint)
    elif len(given) > 1:
        fact = f"{' and '.join(given)} both define the length of the run"
        hint = f"keep one; set the other to null, e.g. train.{given[-1]}=null"
        yield Problem(f"train.{given[0]}", fact, hint)


def _heads(cfg: RunConfig) -> Iterator[Problem]:
    model = cfg.model
    if model.num_heads % model.num_kv_heads:
        fact = f"{model.num_kv_heads} does not divide model.num_heads {model.num_heads}"
        yield Problem(
            "model.num_kv_heads", fact, "query heads share kv heads evenly: use a divisor"
        )
    # A head_dim that is given (Qwen3) need not be hidden_size / num_heads.
    if model.hidden_size % model.num_heads and "head_dim" not in model.model_fields_set:
        fact = f"{model.num_heads} does not divide model.hidden_size {model.hidden_size}"
        yield Problem("model.num_heads", fact, "use a divisor, or set model.head_dim")
    if model.positions == "rotary" and model.head_dim % 2:
        fact = f"{model.head_dim} is odd, and rotary positions rotate pairs of elements"
        yield Problem("model.head_dim", fact, "use an even head_dim or other positions")


def _positions(cfg: RunConfig) -> Iterator[Problem]:
    limit = cfg.model.max_positions
    if limit is not None and limit < cfg.train.seq_len:
        fact = f"{limit} positions are fewer than train.seq_len {cfg.train.seq_len}"
        yield Problem("model.max_positions", fact, f"raise it, or set train.seq_len <= {limit}")


def _schedule(cfg: RunConfig) -> Iterator[Problem]:
    optim, steps = cfg.optim, cfg.train.steps
    warmup = _share(optim.warmup_steps, steps)
    if warmup is not None and warmup > 1:
        fact = f"{optim.warmup_steps} is longer than the run of {steps} steps"
        yield Problem("optim.warmup_steps", fact, 'use a share of the run, e.g. "5%"')
    if optim.schedule != "wsd":
        return
    decay = _share(optim.decay_steps, steps)
    if decay is not None and decay + (warmup or 0) > 1 and (warmup or 0) <= 1:
        fact = f"warm-up {optim.warmup_steps} and decay {optim.decay_steps} are longer than the run"
        yield Problem("optim.decay_steps", fact, 'use shares of the run, e.g. "5%" and "20%"')


def _share(amount: int | str, steps: int | None) -> float | None:
    if isinstance(amount, str):
        return parse_percent(amount)
    return None if steps is None else amount / steps


def _betas(cfg: RunConfig) -> Iterator[Problem]:
    for index, beta in enumerate(cfg.optim.betas):
        if not 0 <= beta < 1:
            fact = f"must be at least 0 and below 1, got {beta}"
            yield Problem(f"optim.betas.{index}", fact, "usual values: [0.9, 0.95]")


def _weights(cfg: RunConfig) -> Iterator[Problem]:
    if not any(corpus.weight for corpus in cfg.data.corpora):
        yield Problem("data.corpora", "no corpus has a weight above 0", "give one weight 1")


def _cache(cfg: RunConfig) -> Iterator[Problem]:
    if cfg.data.cache_bytes is not None and cfg.data.cache_dir is None:
        fact = f"{cfg.data.cache_bytes} bytes of a cache, but data.cache_dir is not set"
        hint = (
            "set data.cache_dir to a folder on each node's own disk, or leave data.cache_bytes out"
        )
        yield Problem("data.cache_bytes", fact, hint)


def _nodes(cfg: RunConfig) -> Iterator[Problem]:
    fewest, nodes = cfg.cluster.min_nodes, cfg.cluster.nodes
    if fewest is not None and fewest > nodes:
        fact = f"{fewest} is above cluster.nodes {nodes}"
        yield Problem("cluster.min_nodes", fact, f"use at most {nodes}")


def _time_limit(cfg: RunConfig) -> Iterator[Problem]:
    cluster = cfg.cluster
    if cluster.time_limit is None:
        return
    if cluster.kind not in CLUSTER_KINDS:
        return
    if not CLUSTER_KINDS[cluster.kind].ends_jobs:
        fact = f"{cluster.time_limit} s, but kind {cluster.kind} has no time limits"
        hint = "leave it out; `lmscale stop` or train.stop_at saves and ends a run"
        yield Problem("cluster.time_limit", fact, hint)
    elif (lead_s := cluster.save_lead_s) is not None and cluster.time_limit <= lead_s:
        key = f"cluster.{cluster.kind}.signal_lead"
        fact = (
            f"{cluster.time_limit} s, and {key} requests a checkpoint {lead_s} s before: the job "
            "would stop as soon as it starts"
        )
        yield Problem("cluster.time_limit", fact, f"raise it, or lower {key}")


def _allow_change(cfg: RunConfig) -> Iterator[Problem]:
    if not cfg.train.allow_change:
        return
    from difflib import get_close_matches

    from lmscale.config.aliases import advice_for
    from lmscale.config.identity import ORDER_KEYS, kinds

    known = kinds()
    for key in cfg.train.allow_change:
        if known.get(key) == "placement":
            fact = f"{key} is a placement key, which may change without permission"
            yield Problem("train.allow_change", fact, f"take {key} out of the list")
        elif key in ORDER_KEYS:
            fact = f"{key} decides the order of the samples: another value would lose and repeat samples"
            yield Problem("train.allow_change", fact, "start another run (train.run_dir)")
        elif key not in known:
            close = get_close_matches(key, known, n=1)
            spelling = f"did you mean {close[0]!r}?" if close else "write keys as in train.steps"
            hint = advice_for(key.split(".")) or spelling
            yield Problem("train.allow_change", f"there is no key {key!r}", hint)


# Each check with all the keys that it reads.
CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("train.steps", "train.tokens", "train.epochs"), _single_length),
    (
        (
            "model.num_heads",
            "model.num_kv_heads",
            "model.hidden_size",
            "model.head_dim",
            "model.positions",
        ),
        _heads,
    ),
    (("model.max_positions", "train.seq_len"), _positions),
    (
        ("optim.schedule", "optim.warmup_steps", "optim.decay_steps", "train.steps"),
        _schedule,
    ),
    (("optim.betas",), _betas),
    *ENGINE_CHECKS,
    (proven.READS, proven.unproven),
    (("data.corpora",), _weights),
    (("data.cache_dir", "data.cache_bytes"), _cache),
    (("cluster.nodes", "cluster.min_nodes"), _nodes),
    (("cluster.kind", "cluster.time_limit", "cluster.slurm"), _time_limit),
    (("train.allow_change",), _allow_change),
)
