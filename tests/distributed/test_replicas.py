"""A planted flip of one bit is found on every kind of copy, and layer statistics count every element once."""

import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lmscale.base.errors import ExitCode
from lmscale.base.world import World
from lmscale.config.run_file import load
from lmscale.engine.base import Engine
from lmscale.engine.layout import block_name
from lmscale.engine.step import StepResult
from lmscale.run_folder.events import EventLog, read_events
from lmscale.run_folder.paths import RunFolder
from lmscale.run_folder.rank_progress import RankProgress
from lmscale.train import build as assemble
from lmscale.train.layer_stats import LayerStats
from lmscale.train.replicas import ReplicaMismatch, Replicas
from lmscale.train.run_context import RunContext
from lmscale.train.stop_request import StopRequest
from tests.support.engine_case import LR, Case, engine_of, mesh_for, micro_batches, model_of
from tests.support.jobs import Job, prepare_corpus, small_run

NORM = "decoder.norm.weight"


def rank_of(case: Case, folder: Path, *overrides: str) -> RunContext:
    cfg = load("smoke", [f"train.run_dir={folder}", *overrides])
    run = RunFolder(folder)
    events = EventLog(run, "test") if dist.get_rank() == 0 else None
    return RunContext(cfg, mesh_for(case), torch.device("cpu"), run, events)


def flip_lowest_bit(engine: Engine, name: str) -> None:
    (tensor,) = [weight.tensor for weight in engine.weights() if weight.name == name]
    tensor.view(-1).view(torch.int32)[-1] ^= 1


def train_and_flip(case: Case, folder: Path, odd: int, every: int = 1) -> tuple[int, str]:
    """(step, words) of the drift that the check found; one rank's bit flips after step 3."""
    with patch.dict(os.environ, SLURMD_NODENAME=f"node{dist.get_rank()}"):
        return _train_and_flip(case, folder, odd, every)


def _train_and_flip(case: Case, folder: Path, odd: int, every: int) -> tuple[int, str]:
    engine = engine_of(case)
    rank = rank_of(case, folder, f"train.replica_check_every_steps={every}")
    replicas = Replicas(rank, engine)
    for step in (1, 2, 3):
        engine.step(micro_batches(case, step), lr=LR)
        if step == 3 and dist.get_rank() == odd:
            flip_lowest_bit(engine, NORM)
        try:
            replicas.after_step(step)
        except ReplicaMismatch as drift:
            return step, str(drift)
    try:
        replicas.before_save(3)
    except ReplicaMismatch as drift:
        return -3, str(drift)
    return 0, ""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("ddp"), id="ddp"),
        pytest.param(Case("fsdp", parallel={"dp_replicate": 2}), id="hsdp"),
        pytest.param(Case("fsdp", parallel={"tp": 2}), id="tp"),
        pytest.param(Case("deepspeed", engine={"zero_stage": 1}), id="zero1"),
    ],
)
def test_two_copies_are_both_named_and_no_host_is_blamed_for_good(
    ranks: Any, tmp_path: Path, case: Case
) -> None:
    found = ranks(2)(train_and_flip, case, tmp_path, 1)
    assert {step for step, _ in found} == {3}, (
        "steps 1 and 2 are sound, and all ranks stop together"
    )
    (words,) = {words for _, words in found}
    assert NORM in words
    assert "rank 0 on node0, rank 1 on node1" in words
    assert "newest checkpoint" in words
    (event,) = [event for event in read_events(RunFolder(tmp_path)) if event["kind"] == "drift"]
    assert event["ranks"] == [0, 1]
    assert event["parameters"] == [NORM]
    assert not event["majority"]
    assert not RunFolder(tmp_path).bad_nodes.exists()


def test_the_odd_one_of_three_is_named_with_its_host_before_a_checkpoint(
    ranks: Any, tmp_path: Path
) -> None:
    found = ranks(3)(train_and_flip, Case("ddp"), tmp_path, 2, 2)
    assert {step for step, _ in found} == {-3}, "step 3 has no turn, but would have been saved"
    (words,) = {words for _, words in found}
    assert "rank 2 on node2" in words and "rank 0" not in words
    (blamed,) = RunFolder(tmp_path).bad_nodes.iterdir()
    assert blamed.name == "node2"
    assert NORM in blamed.read_text()


def norms_of(case: Case, folder: Path) -> dict[str, Any]:
    """The line of step 1, and what the whole model's norms were before it."""
    engine = engine_of(case)
    lines: list[dict[str, Any]] = []
    rank = rank_of(case, folder, "log.layer_stats=true", "log.every_steps=1")
    stats = LayerStats(rank, engine, [lines.append])
    result = engine.step(micro_batches(case, 0), lr=0.0)  # the weights stay as they were built
    stats.note(step=1, result=result)
    assert lines == [], "one step late"
    stats.flush()
    stats.flush()
    (line,) = lines
    return {**line, "whole": result.grad_norm.item()}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("ddp", layer_stats=True), id="ddp"),
        pytest.param(Case("fsdp", layer_stats=True), id="fsdp"),
        pytest.param(Case("fsdp", layer_stats=True, parallel={"tp": 2}), id="tp"),
    ],
)
def test_layer_statistics_are_those_of_the_whole_model(
    ranks: Any, tmp_path: Path, case: Case
) -> None:
    line, other = ranks(2)(norms_of, case, tmp_path)
    assert line == other
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in model_of(case).named_parameters():
        squares[block_name(name)] += parameter.detach().double().square().sum().item()
    assert line["weight_norm"].keys() == squares.keys() == line["grad_norm"].keys()
    for part, value in line["weight_norm"].items():
        assert value == pytest.approx(math.sqrt(squares[part]), rel=1e-6)
    total = math.sqrt(sum(value**2 for value in line["grad_norm"].values()))
    assert total == pytest.approx(line["whole"], rel=1e-9)


def start(world: World, run_file: Path, run_dir: Path, flip_at: int) -> ExitCode:
    """One rank of a whole start; a bit of rank 1 flips after the step `flip_at` of this start."""
    build = assemble.build_engine

    def flipping(*args: Any) -> Engine:
        engine: Any = build(*args)
        step, steps = engine.step, iter(range(1, 1000))

        def with_a_flip(*args: Any, **more: Any) -> StepResult:
            result: StepResult = step(*args, **more)
            if next(steps) == flip_at and world.rank == 1:
                flip_lowest_bit(engine, NORM)
            return result

        engine.step = with_a_flip
        return engine  # type: ignore[no-any-return]

    cfg = load(run_file, [f"train.run_dir={run_dir}"])
    folder = RunFolder(run_dir)
    events = EventLog(folder, world.start) if world.is_root else None
    with patch.object(assemble, "build_engine", flipping):
        try:
            return assemble.train(
                cfg, world, StopRequest(), folder=folder, events=events, progress=RankProgress()
            )
        except ReplicaMismatch as drift:
            return drift.exit_code


def test_a_run_ends_at_the_drift_and_goes_on_from_before_it(ranks: Any, tmp_path: Path) -> None:
    run = small_run(
        prepare_corpus(tmp_path),
        engine={"kind": "ddp", "precision": "fp32"},
        train={"steps": 9, "replica_check_every_steps": 3, "deterministic": False},
        data={"trace": False},
        eval={"corpora": [], "every_steps": None},
        checkpoint={"every_steps": 2},
        log={"trackers": []},
    )
    job = Job(tmp_path)
    job.write(run)
    case = (start, tmp_path / "run.yaml")
    pool = ranks(2, bare=True)
    # Step 9 has the turn; but step 8 would be saved before.
    assert pool(*case, job.run_dir, 7) == [ExitCode.RETRY] * 2
    assert job.checkpoints()[-1] == "step-00000006-a1"
    assert [event["ranks"] for event in job.events() if event["kind"] == "drift"] == [[0, 1]]
    assert pool(*case, job.run_dir, 0) == [ExitCode.DONE] * 2
    whole = Job(tmp_path, "whole")
    assert pool(*case, whole.run_dir, 0) == [ExitCode.DONE] * 2
    assert [line["loss"] for line in job.lines()] == [line["loss"] for line in whole.lines()]
