"""What single keys cannot say: conflicts between keys. Pure, and without a world where possible."""

from collections.abc import Collection, Iterator

from lmscale.config import engines, proven
from lmscale.config.engines import Check
from lmscale.config.refusals import refusals
from lmscale.config.run import RunConfig
from lmscale.errors import Problem
from lmscale.units import parse_percent


def problems(cfg: RunConfig, *, broken: Collection[str] = ()) -> Iterator[Problem]:
    """Conflicts that any number of ranks would have.

    `broken` names keys whose values stand in for unreadable ones; checks that read them are left
    out, so that all true problems of a file can be reported together.
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
    if cfg.train.global_batch < data_ranks:
        fact = f"{cfg.train.global_batch} samples cannot feed {data_ranks} data-parallel ranks"
        yield Problem(
            "train.global_batch", fact, f"set at least {data_ranks}, or start fewer ranks"
        )


def _mesh(cfg: RunConfig, data_ranks: int) -> Iterator[Problem]:
    replicate, shard = cfg.parallel.replicate, cfg.parallel.shard
    if shard == "auto":
        if data_ranks % replicate:
            fact = f"{replicate} does not divide {data_ranks} data-parallel ranks"
            yield Problem("parallel.replicate", fact, "choose a divisor of them")
    elif replicate * shard != data_ranks:
        fact = f"replicate {replicate} x shard {shard} is not {data_ranks}, the ranks of a tp slice"
        yield Problem("parallel.shard", fact, "write auto, or start that many ranks")


def shard_size(cfg: RunConfig, *, world_size: int) -> int:
    """The number that `parallel.shard: auto` stands for. Call world_problems first."""
    if cfg.parallel.shard != "auto":
        return cfg.parallel.shard
    return world_size // (cfg.parallel.tp * cfg.parallel.replicate)


def _one_length(cfg: RunConfig) -> Iterator[Problem]:
    given = [k for k in ("steps", "tokens", "epochs") if getattr(cfg.train, k) is not None]
    if not given:
        hint = 'add one of train.steps, train.tokens (e.g. "20B") or train.epochs'
        yield Problem("train.steps", "the length of the run is missing", hint)
    elif len(given) > 1:
        fact = f"{' and '.join(given)} both say how long the run is"
        hint = f"keep one; set the other to null, e.g. train.{given[-1]}=null"
        yield Problem(f"train.{given[0]}", fact, hint)


def _heads(cfg: RunConfig) -> Iterator[Problem]:
    model = cfg.model
    if model.heads % model.kv_heads:
        fact = f"{model.kv_heads} does not divide model.heads {model.heads}"
        yield Problem("model.kv_heads", fact, "query heads share kv heads evenly: use a divisor")
    # A head_dim that is given (Qwen3) need not be width / heads.
    if model.width % model.heads and "head_dim" not in model.model_fields_set:
        fact = f"{model.heads} does not divide model.width {model.width}"
        yield Problem("model.heads", fact, "use a divisor, or set model.head_dim")
    if model.positions == "rotary" and model.head_dim % 2:
        fact = f"{model.head_dim} is odd, and rotary positions turn pairs"
        yield Problem("model.head_dim", fact, "use an even head_dim or other positions")


def _positions(cfg: RunConfig) -> Iterator[Problem]:
    room = cfg.model.max_positions
    if room is not None and room < cfg.train.seq_len:
        fact = f"{room} positions are fewer than train.seq_len {cfg.train.seq_len}"
        yield Problem("model.max_positions", fact, f"raise it, or set train.seq_len <= {room}")


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
        fact = f"{cfg.data.cache_bytes} bytes of a cache, but data.cache_dir names none"
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
    if cluster.kind != "slurm":
        fact = f"{cluster.time_limit} s, but nobody ends a job of kind {cluster.kind}"
        hint = "leave it out; `lmscale stop` or train.stop_at saves and ends a run"
        yield Problem("cluster.time_limit", fact, hint)
    elif cluster.time_limit <= cluster.slurm.signal_lead:
        fact = (
            f"{cluster.time_limit} s, and cluster.slurm.signal_lead asks for a checkpoint "
            f"{cluster.slurm.signal_lead} s before: the job would stop as soon as it starts"
        )
        yield Problem("cluster.time_limit", fact, "raise it, or lower cluster.slurm.signal_lead")


def _allow_change(cfg: RunConfig) -> Iterator[Problem]:
    if not cfg.train.allow_change:
        return
    from difflib import get_close_matches

    from lmscale.config.identity import ORDER_KEYS, kinds

    known = kinds()
    for key in cfg.train.allow_change:
        if known.get(key) == "placement":
            fact = f"{key} is free to change anyway"
            yield Problem("train.allow_change", fact, f"take {key} out of the list")
        elif key in ORDER_KEYS:
            fact = (
                f"{key} decides which sample comes when: changing it would lose and repeat samples"
            )
            yield Problem("train.allow_change", fact, "start another run (train.run_dir)")
        elif key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "write keys as in train.steps"
            yield Problem("train.allow_change", f"no key is called {key!r}", hint)


# Each check with all the keys that it reads.
CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("train.steps", "train.tokens", "train.epochs"), _one_length),
    (
        ("model.heads", "model.kv_heads", "model.width", "model.head_dim", "model.positions"),
        _heads,
    ),
    (("model.max_positions", "train.seq_len"), _positions),
    (
        ("optim.schedule", "optim.warmup_steps", "optim.decay_steps", "train.steps"),
        _schedule,
    ),
    (("optim.betas",), _betas),
    *engines.CHECKS,
    (proven.READS, proven.unproven),
    (("data.corpora",), _weights),
    (("data.cache_dir", "data.cache_bytes"), _cache),
    (("cluster.nodes", "cluster.min_nodes"), _nodes),
    (("cluster.kind", "cluster.time_limit", "cluster.slurm"), _time_limit),
    (("train.allow_change",), _allow_change),
)
