"""Tensor parallel runs as a user starts them: losses as of one process, and any layout goes on from any other."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import Job, lmscale, rank_pids, small_run

TP2 = "parallel.tp=2"
STEPS = 12


def run_file(corpus: Path, **engine: Any) -> dict[str, Any]:
    return small_run(
        corpus,
        engine={"kind": "ddp", **engine},
        train={"steps": STEPS, "replica_check_every_steps": 4},
        optim={"lr": 1e-3},
        eval={"every_steps": STEPS, "max_samples": 8},
        checkpoint={"every_steps": 3, "keep": 9},
        log={"layer_stats": True, "every_steps": 4, "trackers": []},
    )


def trained(job: Job, *overrides: str, ranks: int = 2) -> str:
    done = job.train("--nproc", str(ranks), *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def writers(job: Job) -> list[str]:
    return sorted(path.stem for path in (job.run_dir / "trace").iterdir())


@pytest.mark.slow
def test_two_tensor_parallel_ranks_train_as_one_process_does(job: Job, corpus: Path) -> None:
    alone = Job(job.folder, "alone")
    for one in (job, alone):
        one.write(run_file(corpus, precision="fp64"))
    trained(job, TP2)
    trained(alone, ranks=1)
    for line, wanted in zip(job.lines(), alone.lines(), strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-10)
    assert job.trace() == alone.trace()
    assert writers(job) == ["rank-0"], "both ranks of the group saw the same samples"

    layers, wanted_layers = job.lines("layers.jsonl"), alone.lines("layers.jsonl")
    assert [line["step"] for line in layers] == [4, 8, 12]
    for line, wanted in zip(layers, wanted_layers, strict=True):
        for kind in ("grad_norm", "weight_norm"):
            assert line[kind] == pytest.approx(wanted[kind], rel=1e-9)
            assert line[kind].keys() >= {"decoder.blocks.0", "decoder.blocks.1", "decoder.norm"}
        total = sum(value**2 for value in line["grad_norm"].values()) ** 0.5
        assert total == pytest.approx(job.lines()[line["step"] - 1]["grad_norm"], rel=1e-12)

    scored = lmscale("eval", job.run_dir, "--json", "--max-samples", "8", cwd=job.folder)
    assert scored.returncode == 0, scored.stderr
    assert "tp=1" in scored.stderr, "on one rank, and says so"
    again = [json.loads(line) for line in scored.stdout.splitlines()]
    found = {line["metric"]: line["value"] for line in job.lines("eval.jsonl")}
    assert {line["metric"] for line in again} == {"loss", "bits_per_byte"}
    for line in again:
        assert line["value"] == pytest.approx(found[line["metric"]], rel=1e-10)


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_and_back(job: Job, corpus: Path) -> None:
    """tp 2, ZeRO-3, tp 2: losses as of one run that nobody disturbed, each sample traced once."""
    alone = Job(job.folder, "alone")
    for one in (job, alone):
        one.write(run_file(corpus, precision="fp32"))
    trained(alone, ranks=1)
    trained(job, TP2, "engine.kind=fsdp", "train.stop_at=4")
    trained(job, "engine.kind=deepspeed", "engine.zero_stage=3", "train.stop_at=8")
    assert writers(job) == ["rank-0", "rank-1"]
    # The last of them is lost: steps 7 and 8 are done anew, and rank 1 has nobody left who would write its lines.
    shutil.rmtree(job.run_dir / "checkpoints" / "step-00000008-a2")
    said = trained(job, TP2, "engine.kind=fsdp")
    assert "resuming from step 6" in said
    lines = job.lines()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, wanted in zip(lines, alone.lines(), strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=5e-7)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-5)
    assert job.trace() == alone.trace()
    assert [line["step"] for line in job.lines("layers.jsonl")] == [4, 8, 12]


@pytest.mark.slow
def test_the_loss_of_a_tensor_parallel_rank_is_made_good(job: Job, corpus: Path) -> None:
    run = run_file(corpus, kind="fsdp", precision="fp32")
    run["train"]["steps"] = 40  # the kill must come before the end
    run["checkpoint"]["every_steps"] = 10
    run["model"]["dropout"] = 0.1  # of exact masks, which a new start must draw again
    alone = Job(job.folder, "alone")
    for one in (job, alone):
        one.write(run)
    process = job.start(
        "--nproc", "2", TP2, "parallel.sequence_parallel=true", "cluster.max_restarts=2"
    )
    job.wait_for_step(12, process, timeout=180)
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank_pids(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert "resuming from step 10" in said
    trained(alone, ranks=1)
    lines = job.lines()
    assert [line["step"] for line in lines] == list(range(1, 41))
    for line, wanted in zip(lines, alone.lines(), strict=True):
        assert line["loss"] == pytest.approx(
            wanted["loss"], rel=1e-5
        )  # rounding, over 40 steps of Adam
    assert job.trace() == alone.trace()
