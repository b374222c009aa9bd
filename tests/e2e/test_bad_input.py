"""What a user does wrong, or the machine does to them, gets words, the right exit code, and costs nothing."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.jobs import Job, lmscale, small_run, write_texts


def refused(job: Job, *overrides: str, code: int, words: list[str]) -> str:
    done = job.train(*overrides)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    for word in words:
        assert word in said, said
    assert "Traceback" not in said, said
    return said


def test_unknown_repeated_and_mistyped_keys_are_reported_together(job: Job, corpus: Path) -> None:
    (job.folder / "run.yaml").write_text(
        "model: {num_layers: two, hidden_size: 32, num_heads: 2}\n"
        f"data: {{corpora: [{{path: {corpus}}}]}}\n"
        "optim: {lr: 1e-3, warmup_step: 5}\n"
        "train: {steps: 10, steps: 20, global_batch_size: 8, seq_len: 32}\n"
    )
    refused(
        job, code=78, words=["model.num_layers", "optim.warmup_step", "warmup_steps", "train.steps"]
    )
    assert not (job.folder / "runs").exists()


def test_a_missing_corpus_names_the_command(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus))
    refused(job, "data.corpora=nowhere", code=78, words=["nowhere", "lmscale prepare"])


def test_an_empty_corpus_folder_is_damaged_not_absent(job: Job, corpus: Path) -> None:
    (job.folder / "empty").mkdir()
    job.write(small_run(corpus))
    refused(job, "data.corpora=empty", code=65, words=["manifest"])


@pytest.fixture
def copy(job: Job, corpus: Path) -> Path:
    return Path(shutil.copytree(corpus, job.folder / "copy"))


def shards(corpus: Path) -> list[Path]:
    found = sorted((corpus / "train").glob("*.tar"))
    assert len(found) > 1
    return found


def test_a_truncated_shard_is_named(job: Job, corpus: Path, copy: Path) -> None:
    for shard in shards(copy):
        os.truncate(shard, shard.stat().st_size // 2)
    job.write(small_run(corpus))
    refused(job, f"data.corpora={copy}", code=65, words=[".tar", "lmscale verify"])
    checked = lmscale("verify", copy, cwd=job.folder)
    assert checked.returncode == 65
    assert all(shard.name in checked.stdout + checked.stderr for shard in shards(copy))


def test_one_flipped_bit_is_never_trained_on(job: Job, corpus: Path, copy: Path) -> None:
    """A flip in every shard's first chunk: training meets it within the first epoch and stops."""
    for shard in shards(copy):
        data = bytearray(shard.read_bytes())
        data[1024 + 100] ^= 4
        shard.write_bytes(data)
    job.write(small_run(corpus, train={"steps": 200}))
    said = refused(job, f"data.corpora={copy}", code=65, words=["CRC32C", ".tar"])
    assert "lmscale verify" in said


def test_a_missing_shard_is_named(job: Job, corpus: Path, copy: Path) -> None:
    for shard in shards(copy):
        shard.unlink()
    job.write(small_run(corpus))
    refused(job, f"data.corpora={copy}", code=65, words=[".tar"])


def test_a_corpus_of_another_tokenizer_is_refused(job: Job, corpus: Path) -> None:
    source = write_texts(job.folder, seed=1)
    done = lmscale(
        "prepare", "other", source, "--tokenizer", "bpe:300", "--heldout", "5%", cwd=job.folder
    )
    assert done.returncode == 0, done.stderr
    job.write(small_run(corpus))
    refused(job, "eval.corpora=[other]", code=78, words=["eval.corpora", "tokenizer"])
    tokenizer = next((job.folder / "other" / "train").glob("*tokenizer*.json"))
    refused(job, f"data.tokenizer={tokenizer}", code=78, words=["data.tokenizer", "tokenizer"])


def test_fewer_samples_than_one_batch(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus))
    refused(
        job,
        "train.global_batch_size=1000000",
        code=78,
        words=["train.global_batch_size", "samples"],
    )


def test_fewer_samples_in_a_batch_than_ranks(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus))
    refused(job, "train.global_batch_size=1", code=78, words=["train.global_batch_size", "2"])


def test_an_indivisible_batch_trains_and_the_waste_is_printed(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus))
    done = job.train("train.global_batch_size=7", "train.steps=4", "eval.corpora=[]")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "12.5 %" in said or "12.5%" in said, said  # 7 rows on 2 ranks x 2 micro-batches of 2
    assert [line["position"] for line in job.lines()] == [7, 14, 21, 28]


def test_another_identity_is_refused_and_nothing_is_touched(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus))
    assert job.train("train.stop_at=10").returncode == 0
    before = sorted(
        path
        for path in job.run_dir.rglob("*")
        if "events" not in path.parts and "logs" not in path.parts
    )
    metrics = (job.run_dir / "metrics.jsonl").read_bytes()
    refused(
        job,
        "optim.lr=0.1",
        "model.num_layers=3",
        code=78,
        words=["optim.lr", "model.num_layers", "allow_change"],
    )
    after = sorted(
        path
        for path in job.run_dir.rglob("*")
        if "events" not in path.parts and "logs" not in path.parts
    )
    assert before == after
    assert (job.run_dir / "metrics.jsonl").read_bytes() == metrics
    done = job.train("train.steps=45", "train.allow_change=[train.steps]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(job.lines()) == 45


def test_a_second_start_is_refused_and_the_first_goes_on(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus, train={"steps": 100_000}, checkpoint={"every_steps": 100_000}))
    first = job.start()
    job.wait_for_step(3, first)
    said = refused(job, code=78, words=["pid", "lmscale stop"])
    assert "attempt" in said
    step = len(job.lines())
    job.wait_for_step(step + 20, first)
    stopped = lmscale("stop", job.run_dir, cwd=job.folder)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    first.communicate(timeout=60)
    assert first.returncode == 85
    assert (job.run_dir / "stop").exists()
    steps = [line["step"] for line in job.lines()]
    assert steps == list(range(1, len(steps) + 1))


def test_every_checkpoint_damaged_is_65_and_one_damaged_falls_back(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus))
    assert job.train("train.stop_at=14").returncode == 0
    names = job.checkpoints()
    assert len(names) == 2
    newest = job.run_dir / "checkpoints" / names[-1]
    for file in newest.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    done = job.train("train.stop_at=16")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "damaged" in said
    assert names[-1] in said
    assert [line["step"] for line in job.lines()] == list(range(1, 17))
    for name in job.checkpoints():
        (job.run_dir / "checkpoints" / name / "manifest.json").unlink()
    refused(job, code=65, words=["damaged", "lmscale verify"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for metrics and not for a checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs root to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_costs_checkpoints_not_the_run(
    job: Job, corpus: Path, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    job.write(
        small_run(
            corpus, model={"hidden_size": 64}, train={"run_dir": str(run_dir)}, log={"trackers": []}
        )
    )
    done = job.train("eval.corpora=[]")
    said = done.stdout + done.stderr
    assert done.returncode == 75, said
    assert "No space left" in said
    assert "Traceback" not in said
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 40, (
        "the run survives a failed save"
    )
    assert not list((run_dir / "checkpoints").glob("*")), "a failed save leaves nothing behind"


def test_out_of_memory_names_the_levers(job: Job, corpus: Path) -> None:
    job.write(small_run(corpus))
    said = refused(
        job, "model.hidden_size=200000", "model.num_heads=2", "model.ffn_hidden_size=4000000", code=78,
        words=["out of memory", "train.micro_batch_size"],
    )  # fmt: skip
    assert "engine.activation_checkpointing" in said
