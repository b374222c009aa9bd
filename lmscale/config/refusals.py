"""Settings that have a name but no implementation yet, each with the nearest one that works.

Combinations that work and were not proven are proven.py's.

A line leaves this file in the same change that makes its setting work.
"""

from collections.abc import Iterator

from lmscale.config.run import RunConfig
from lmscale.errors import Problem


def refusals(cfg: RunConfig) -> Iterator[Problem]:
    """Refuse here, on the user's machine, rather than in a queue or on a cluster."""
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
        nearest = "use null; train.resume=CHECKPOINT goes on with weights, moments and position"
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
    if cfg.cluster.kind == "kubernetes":
        yield _not_yet("cluster.kind", "kubernetes", "use slurm, mpi or local")
