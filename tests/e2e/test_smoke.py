"""The main job, shortened: the standard library's source text, prepared and learned better than by counting."""

import sys
from pathlib import Path

import pytest

from tests.support.jobs import Job, clean_env, finished_process, lmscale

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_smoke_run_beats_counting(job: Job) -> None:
    """Four fifths of its steps: enough to be below the bigram of as many tokens."""
    collect = [sys.executable, ROOT / "tools" / "stdlib_corpus.py", "data/stdlib.jsonl"]
    (job.folder / "data").mkdir()
    assert finished_process(collect, cwd=job.folder, env=clean_env()).returncode == 0
    prepared = lmscale(
        "prepare", "data/smoke", "data/stdlib.jsonl", "--tokenizer", "bpe:4096",
        "--heldout", "5%", "--chunk-tokens", "65536", cwd=job.folder,
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    done = lmscale(
        "train", "smoke", "train.steps=400", "eval.every_steps=400", cwd=job.folder, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job.name = "smoke"
    scores = {line["metric"]: line["value"] for line in job.lines("eval.jsonl")}
    assert scores["bits_per_byte"] < scores["bits_per_byte_bigram"]
    assert scores["bits_per_byte"] < scores["bits_per_byte_unigram"]
    assert "below both" in done.stdout + done.stderr
