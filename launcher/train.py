"""`lmscale train RUN.yaml`: check everything that can be checked without torch, then supervise."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from launcher.handoff import command, hand_off
from launcher.length import corpus_samples
from launcher.ranks import rank_env
from launcher.spawn import Place
from launcher.supervise import Job, supervise
from lmscale.config import checks
from lmscale.config.length import total_steps
from lmscale.config.load import load
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, ExitCode, Problem, UsageError
from lmscale.run.checkpoints import newest_valid
from lmscale.run.events import start_name
from lmscale.run.folder import RunFolder
from lmscale.run.hold import wait_for_silence


def train(source: str, overrides: Sequence[str], nproc: int | None) -> int:
    """Be a rank where somebody has started ranks; else start them and see them to their end."""
    if nproc is None and (added := rank_env(os.environ)) is not None:
        hand_off("train", [source, *overrides], {**os.environ, **added})
    if nproc is not None:
        overrides = [*overrides, f"cluster.ranks_per_node={nproc}"]
    cfg = load(source, overrides)
    num_ranks, nodes, node, master = world_of(cfg, os.environ)
    if found := [*checks.world_problems(cfg, world_size=num_ranks * nodes), *_missing(cfg)]:
        raise ConfigError(found)
    folder, by_hand = RunFolder(Path(cfg.train.run_dir)), "LMSCALE_START" not in os.environ
    if by_hand:
        wait_for_silence(folder)  # here, where Ctrl-C still ends the process at once
    if (step := finished(cfg, folder)) is not None:
        sys.stderr.write(_farewell(folder, step))
        return ExitCode.DONE
    job = Job(
        command=command("train", [source, *overrides]),
        folder=folder,
        place=Place(num_ranks, nodes, node, master),
        start=start_name(os.environ),
        by_hand=by_hand,
        max_restarts=cfg.cluster.max_restarts,
        env=os.environ,
    )
    return supervise(job)


def world_of(cfg: RunConfig, env: Mapping[str, str]) -> tuple[int, int, int, str | None]:
    """Ranks on this host, number of hosts, this host's number, and where the ranks meet."""
    num_ranks = cfg.cluster.ranks_per_node
    if num_ranks is None:
        from launcher.gpus import count_gpus

        num_ranks = count_gpus(env) or 2
    given = {name: env.get(name) for name in ("LMSCALE_NODES", "LMSCALE_NODE_RANK")}
    if any(text is not None and not text.isdecimal() for text in given.values()):
        raise UsageError(
            f"environment: {given} are not counts; let a template set them, or unset them"
        )
    nodes = int(given["LMSCALE_NODES"] or 1)
    node = int(given["LMSCALE_NODE_RANK"] or 0)
    master = env.get("LMSCALE_MASTER")
    if node >= nodes or (nodes > 1 and ":" not in (master or "")):
        raise UsageError(
            f"environment: node {node} of {nodes} meeting at LMSCALE_MASTER={master!r}; "
            "every node needs LMSCALE_NODES, LMSCALE_NODE_RANK and LMSCALE_MASTER=host:port"
        )
    if nodes > 1 and not env.get("LMSCALE_START"):
        raise UsageError(
            f"environment: {nodes} nodes need LMSCALE_START, a name of this start that is the same on "
            "every node and new each time: by it they find each other (e.g. job id and restart count)"
        )
    if nodes != cfg.cluster.nodes:
        fact = f"{cfg.cluster.nodes}, but this start has {nodes} (LMSCALE_NODES)"
        hint = "start it on every node with LMSCALE_NODES set, or use cluster.nodes=1"
        raise ConfigError([Problem("cluster.nodes", fact, hint)])
    return num_ranks, nodes, node, master


def finished(cfg: RunConfig, folder: RunFolder) -> int | None:
    """The step of the checkpoint that completes the run, if there is one of the same identity.

    With another identity the ranks shall judge: they know the corpora, and name the keys.
    """
    if cfg.train.resume == "never" or (found := newest_valid(folder)) is None:
        return None
    from lmscale.config.identity import differing, identity
    from lmscale.run.manifest import read_manifest

    body = read_manifest(found.path)
    before, stands = body.get("identity", {}), body.get("state", {}).get("train", {})
    blank = {"data.corpora": None, "data.tokenizer": None, "data.streams": None}
    now = identity(cfg, corpora=[""] * len(cfg.data.corpora), tokenizer="", streams=0)
    changed = differing({**before, **blank}, {**now, **blank})
    if set(changed) - set(cfg.train.allow_change):
        return None
    position = stands.get("position", found.step * cfg.train.global_batch)
    total = total_steps(cfg, partial(corpus_samples, cfg), step=found.step, position=position)
    return found.step if found.step >= total else None


def _missing(cfg: RunConfig) -> Iterator[Problem]:
    paths = {f"data.corpora[{i}].path": corpus.path for i, corpus in enumerate(cfg.data.corpora)}
    paths |= {f"eval.corpora[{i}]": path for i, path in enumerate(cfg.eval.corpora)}
    for key, path in paths.items():
        if not Path(path).exists():
            hint = f"make it with: lmscale prepare {path} INPUT..."
            yield Problem(key, f"{path} does not exist", hint)


def _farewell(folder: RunFolder, step: int) -> str:
    return (
        f"finished: {folder.path} stands at its last step, {step}. Its report: {folder.report}. "
        "To train on, raise train.steps with train.allow_change='[train.steps]'\n"
    )
