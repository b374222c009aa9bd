"""What a layout changes around a run: seeds, words, scoring on other ranks, the loss scale."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lmscale.config.run_file import load
from lmscale.config.schema import RunConfig
from lmscale.distributed.mesh import Mesh
from lmscale.run_folder.events import EventLog, read_events
from lmscale.run_folder.paths import RunFolder
from lmscale.train import commands, loop
from lmscale.train import restore as attempt
from lmscale.train.environment import layout
from lmscale.train.layer_stats import LossScaleRecorder
from lmscale.train.restore import AttemptClaim, ResumePoint
from lmscale.train.run_context import RunContext

Place = tuple[int, int]  # dp rank, tp rank


def rank_of(cfg: RunConfig, *, events: EventLog | None = None, **mesh: int) -> RunContext:
    place = cast(Mesh, SimpleNamespace(world=None, **mesh))
    return RunContext(cfg, place, cast(Any, None), cast(Any, None), events)


@pytest.mark.parametrize(
    ("overrides", "alike"),
    [
        ((), [(0, 0), (0, 1)]),  # a whole residual stream on each tp rank
        (("parallel.tp=2", "parallel.sequence_parallel=true"), [(0, 0)]),  # tokens of its own
        (("train.deterministic=true",), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    ],
)
def test_who_draws_what_the_first_rank_draws(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], alike: list[Place]
) -> None:
    cfg = load("smoke", overrides)
    drawn: dict[Place, Any] = {}
    for place in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        seen: list[Any] = []
        monkeypatch.setattr(
            loop, "seed_step", lambda seed, seen=seen, **at: seen.append((seed, at))
        )
        of_rank = SimpleNamespace(rank=rank_of(cfg, dp_rank=place[0], tp_rank=place[1]))
        loop.TrainLoop._seed(cast(loop.TrainLoop, of_rank), 7)
        (drawn[place],) = seen
    assert [place for place, at in drawn.items() if at == drawn[0, 0]] == alike


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("parallel.tp=2", "parallel.sequence_parallel=true"),
         "replicate 1 x shard 4 x tp 2, sequence parallel"),
        (("engine.kind=deepspeed", "engine.zero_stage=3", "engine.offload=all"),
         "ZeRO stage 3 over 4, offload all"),
        (("engine.kind=ddp",), "replicate 4"),
    ],
)  # fmt: skip
def test_a_layout_in_words(overrides: tuple[str, ...], words: str) -> None:
    cfg = load("smoke", overrides)
    sizes = {"replicate_size": 1, "shard_size": 4, "dp_size": 4, "tp_size": cfg.parallel.tp}
    assert layout(cfg, cast(Mesh, SimpleNamespace(**sizes))) == words


@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_scoring_keeps_tensor_parallelism_where_the_ranks_fill_it(
    caplog: pytest.LogCaptureFixture, ranks: int, tp: int
) -> None:
    cfg = load("smoke", ["parallel.tp=2", "parallel.sequence_parallel=true"])
    with caplog.at_level(logging.INFO):
        parallel = cfg.parallel.model_copy(update=commands._parallel_changes(cfg, ranks))
    assert (parallel.tp, parallel.sequence_parallel) == (tp, tp > 1)
    assert ("tp=1" in caplog.text) == (tp == 1)


def test_the_loss_scale_is_told_when_it_changes_and_given_back_on_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp16 = [
        "engine.kind=deepspeed",
        "engine.precision=fp16",
        "optim.max_nonfinite_steps=20",
        "log.every_steps=2",
    ]
    cfg = load("smoke", [*fp16, f"train.run_dir={tmp_path}"])
    engine: Any = SimpleNamespace(loss_scale=2.0**16)
    with EventLog(RunFolder(tmp_path), "test") as events:
        rank = rank_of(cfg, events=events)
        watch = LossScaleRecorder(rank, engine)
        for step, scale in enumerate((2.0**15, 2.0**14, 2.0**14, 2.0**14, 2.0**14, 2.0**15), 1):
            engine.loss_scale = scale
            watch.after_step(step)
    told = [(e["step"], e["scale"]) for e in read_events(RunFolder(tmp_path))]
    assert told == [(2, 2.0**14), (6, 2.0**15)]

    given: dict[str, Any] = {}
    engine.state, engine.finish_load = lambda loading: {}, lambda **kept: given.update(kept)
    monkeypatch.setattr(attempt, "load_checkpoint", lambda path, tensors: None)
    for state in ({"train": {"updates": 3}, "loss_scale": 512.0}, {"train": {"updates": 4}}):
        AttemptClaim(rank)._try_load(engine, ResumePoint(tmp_path, 3, {"state": state}))
        assert given == {
            "optim_step": state["train"]["updates"],
            "loss_scale": state.get("loss_scale"),
        }
