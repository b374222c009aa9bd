"""What a trained run is good for, and the rarer ways to start one."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.jobs import Job, clean_env, finished_process, lmscale, rank_pids, small_run

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Job:
    job = Job(tmp_path_factory.mktemp("trained"))
    job.write(small_run(corpus, train={"steps": 20}, log={"profile": {"steps": "3:4"}}))
    done = job.train()
    assert done.returncode == 0, done.stdout + done.stderr
    return job


def scores(text: str) -> dict[str, tuple[float, int]]:
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {line["metric"]: (line["value"], line["count"]) for line in lines}


def test_eval_scores_each_sample_once_on_uneven_ranks(trained: Job) -> None:
    alone = lmscale("eval", trained.run_dir, "--json", cwd=trained.folder)
    assert alone.returncode == 0, alone.stderr
    one = scores(alone.stdout)
    many = finished_process(
        [BIN / "torchrun", "--nproc-per-node", "3", "-m", "lmscale", "eval", trained.run_dir, "--json"],
        cwd=trained.folder, env=clean_env(),
    )  # fmt: skip
    assert many.returncode == 0, many.stderr
    three = scores(many.stdout)
    recorded = {line["metric"]: line for line in trained.lines("eval.jsonl") if line["step"] == 20}
    for metric in ("loss", "bits_per_byte"):
        assert one[metric][1] == three[metric][1] == recorded[metric]["count"]
        assert one[metric][0] == pytest.approx(recorded[metric]["value"], rel=1e-6)
        assert three[metric][0] == pytest.approx(one[metric][0], rel=1e-6)


def test_eval_of_another_corpus_and_of_one_checkpoint(trained: Job, corpus: Path) -> None:
    checkpoint = trained.run_dir / "checkpoints" / trained.checkpoints()[0]
    done = lmscale(
        "eval", checkpoint, "--corpus", corpus / "train", "--max-samples", "5", "--json",
        cwd=trained.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss, count = scores(done.stdout)["loss"]
    assert 0 < loss < 6
    assert 5 * 30 < count <= 5 * 32


def test_generate_is_greedy_exact_and_takes_tokens(trained: Job) -> None:
    def new(*argv: str) -> dict[str, object]:
        done = lmscale("generate", trained.run_dir, *argv, "--json", cwd=trained.folder)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    words = new("--prompt", "the quick", "--max-new", "8", "--ignore-eos")
    assert len(words["tokens"]) == 8
    assert words == new("--prompt", "the quick", "--max-new", "8", "--ignore-eos")
    ids = [0] + [16 + byte for byte in b"the quick"]  # bos, then bytes
    assert words == new("--tokens", ",".join(map(str, ids)), "--max-new", "8", "--ignore-eos")
    refused = lmscale(
        "generate", trained.run_dir, "--tokens", "9999", "--max-new", "1", cwd=trained.folder
    )
    assert refused.returncode == 2
    assert "vocabulary" in refused.stderr


def test_a_profile_of_the_chosen_steps_is_written(trained: Job) -> None:
    trace = json.loads((trained.run_dir / "logs" / "profile-3-4-trace.json").read_text())
    assert any("aten::" in str(event.get("name")) for event in trace["traceEvents"])


@pytest.mark.slow
def test_going_on_from_another_runs_checkpoint(trained: Job, corpus: Path, job: Job) -> None:
    source = trained.run_dir / "checkpoints" / trained.checkpoints()[0]
    step = int(source.name.split("-")[1])
    job.write(small_run(corpus, train={"steps": 20}))
    done = job.train(f"train.resume={source}", f"train.stop_at={step + 2}")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["step"]: line for line in job.lines()}
    assert sorted(lines) == [step + 1, step + 2]
    for line in trained.lines():
        if line["step"] in lines:
            assert lines[line["step"]]["loss"] == line["loss"]
    again = job.train(f"train.resume={source}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line["step"] for line in job.lines()] == list(range(step + 1, 21))
    never = job.train("train.resume=never")
    assert never.returncode == 78
    assert "train.resume" in never.stderr


def test_the_supervisor_starts_again_in_place(trained: Job, corpus: Path, job: Job) -> None:
    job.write(small_run(corpus, train={"steps": 20}))
    process = job.start("cluster.max_restarts=1")
    job.wait_for_step(9, process)
    os.kill(rank_pids(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    same = ("step", "loss", "grad_norm", "position")
    want = [{key: line[key] for key in same} for line in trained.lines()]
    assert [{key: line[key] for key in same} for line in job.lines()] == want
    assert any(event["kind"] == "restart" for event in job.events())
