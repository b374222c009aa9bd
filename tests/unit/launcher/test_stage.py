"""The program that fills a node's cache before its ranks start."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmscale.base.errors import ConfigError
from lmscale.config.run_file import load
from lmscale.config.yaml import render
from lmscale.corpus.manifest import Manifest, TokenizerEntry, tokenizer_entry
from lmscale.corpus.order import Order, step_positions
from lmscale.corpus.shard_format import Chunk, chunk_range, num_chunks, shard_name, write_shard
from lmscale_launcher.stage import command

SPECIAL: dict[str, int | None] = {"bos": 0}
BATCH, SEQ_LEN, CHUNK = 4, 16, 64


def make_corpus(path: Path, *, tokens: int = 1200, chunk_tokens: int = CHUNK) -> Manifest:
    path.mkdir()
    stream = np.random.default_rng(0).integers(0, 300, tokens)

    def chunk(number: int) -> Chunk:
        first, stop = chunk_range(number, tokens=tokens, chunk_tokens=chunk_tokens)
        return Chunk(stream[first:stop], np.array([0]))

    count, each = num_chunks(tokens, chunk_tokens), 4
    shards = tuple(
        write_shard(
            path / shard_name(number),
            map(chunk, range(first, min(first + each, count))),
            first_chunk=first,
            dtype="u16",
        )
        for number, first in enumerate(range(0, count, each))
    )
    manifest = Manifest("u16", chunk_tokens, tokens, count, tokens, tokenizer(path), shards)
    manifest.save(path)
    return manifest


def tokenizer(path: Path) -> TokenizerEntry:
    file = path / "tokenizer.json"
    file.write_text("{}")
    return tokenizer_entry(file, fingerprint="f" * 64, vocab_size=300, special=SPECIAL)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "corpus")
    return write_run(tmp_path, {})


def write_run(folder: Path, train: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    body = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1},
        "data": {
            "corpora": [str(folder / "corpus")],
            "cache_dir": "cache",
            "shuffle_window_chunks": 2,
        },
        "optim": {"lr": 1e-3},
        "train": {"steps": 6, "global_batch_size": BATCH, "seq_len": SEQ_LEN} | train,
    }
    path.write_text(render(body))
    return path


def program(
    run: Path, *overrides: str, node: int = 0, nodes: int = 1, ranks: int = 2
) -> subprocess.CompletedProcess[str]:
    argv = command(
        run, node=node, nodes=nodes, ranks_per_node=ranks,
        overrides=[f"data.cache_dir={run.parent / 'cache'}", *overrides],
    )  # fmt: skip
    assert argv is not None
    return subprocess.run(
        argv, cwd=run.parent, text=True, capture_output=True, timeout=60, check=False
    )


def cached(run: Path, name: str = "cache") -> set[int]:
    return {int(path.stem) for path in (run.parent / name).glob("*/*.chunk")}


def read_by(node: int, nodes: int, ranks: int, *, steps: range) -> set[int]:
    """The chunks that the ranks of a node read, by their own functions."""
    samples = (1200 - 1) // SEQ_LEN
    order = Order(samples, CHUNK // SEQ_LEN, BATCH, window_chunks=2, seed=0)
    found: set[int] = set()
    for step in steps:
        for rank in range(node * ranks, (node + 1) * ranks):
            mine = step_positions(
                step * BATCH,
                global_batch_size=BATCH,
                streams=BATCH,
                dp_rank=rank,
                dp_size=nodes * ranks,
            )
            found |= set((order.samples_at(mine)[1] // (CHUNK // SEQ_LEN)).tolist())
    return found


def test_no_cache_no_command(run: Path) -> None:
    assert (
        command(run, node=0, nodes=1, ranks_per_node=2, overrides=["data.cache_dir=null"]) is None
    )
    with pytest.raises(ConfigError):
        command(run, node=0, nodes=1, ranks_per_node=2, overrides=["data.cachedir=a"])


def test_it_stages_exactly_what_the_ranks_of_this_node_read(run: Path) -> None:
    for node, cache in ((0, "a"), (1, "b")):
        done = program(run, f"data.cache_dir={run.parent / cache}", node=node, nodes=2)
        assert done.returncode == 0, done.stderr
        want = read_by(node, 2, 2, steps=range(6))
        assert cached(run, cache) == want
        assert f"{len(want)} chunks" in done.stderr
    again = program(run, f"data.cache_dir={run.parent / 'a'}", node=0, nodes=2)
    assert "0 chunks" in again.stderr
    assert f"{len(cached(run, 'a'))} were there" in again.stderr


def test_it_goes_on_where_the_newest_checkpoint_stands(run: Path) -> None:
    from lmscale.run_folder.checkpoints import write_manifest

    folder = run.parent / "runs" / "run" / "checkpoints" / "step-00000004-a1"
    folder.mkdir(parents=True)
    state = {"step": 4, "position": 4 * BATCH, "streams": BATCH, "journal": []}
    body = {"format": 1, "step": 4, "attempt": 1, "files": {}, "state": {"train": state}}
    write_manifest(folder, {**body, "identity": {"data.streams": BATCH}})
    done = program(run)
    assert done.returncode == 0, done.stderr
    assert cached(run) == read_by(0, 1, 2, steps=range(4, 6))
    assert program(run, "train.stop_at=5", f"data.cache_dir={run.parent / 'b'}").returncode == 0
    assert cached(run, "b") == read_by(0, 1, 2, steps=range(4, 5))


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["train.seq_len=17"], 78, "train.seq_len"),
        (["data.corpora=nowhere"], 65, "nowhere"),
        (["data.cache_dir=/proc/nowhere"], 0, "corpus is read instead"),
        (["data.cache_dir=run.yaml/cache"], 78, "data.cache_dir"),
        (["train.global_batch_size=1"], 78, "train.global_batch_size"),
        (["data.cache_bytes=10"], 0, "cache is full"),
    ],
)
def test_exit_codes(run: Path, overrides: list[str], code: int, words: str) -> None:
    done = program(run, *overrides)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("inside", ["corpus", "corpus/cache", "link/deeper", "corpus/../corpus/x"])
def test_a_cache_inside_a_corpus_is_refused(run: Path, inside: str) -> None:
    """It would be a corpus with files that nothing covers: damaged, by `lmscale verify`."""
    (run.parent / "link").symlink_to(run.parent / "corpus")
    before = sorted(path.name for path in (run.parent / "corpus").iterdir())
    done = program(run, f"data.cache_dir={run.parent / inside}")
    assert done.returncode == 78, done.stderr
    assert "lies in the corpus" in done.stderr
    assert sorted(path.name for path in (run.parent / "corpus").iterdir()) == before


def test_a_cache_beside_a_run_and_its_locks_is_used(run: Path) -> None:
    for folder in ("", "events", "jobs", "checkpoints"):
        place = run.parent / "runs" / "run" / folder
        done = program(run, f"data.cache_dir={place}")
        assert done.returncode == 0, done.stderr
        assert list(place.glob("*/*.chunk"))
        assert not (place / ".lock").exists()


def test_a_damaged_corpus_is_65(run: Path) -> None:
    shard = run.parent / "corpus" / shard_name(0)
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    done = program(run, "train.epochs=1", "train.steps=null")
    assert done.returncode == 65, done.stderr
    assert "shard-000000.tar" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_ends_it_soon_and_what_is_staged_stays(tmp_path: Path, number: int) -> None:
    make_corpus(tmp_path / "corpus", tokens=600_000, chunk_tokens=64)
    run = write_run(tmp_path, {"epochs": 1, "steps": None})
    argv = command(run, node=0, nodes=1, ranks_per_node=1)
    assert argv is not None
    for _ in range(3):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        process = subprocess.Popen(argv, cwd=tmp_path, text=True, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while not any((tmp_path / "cache").glob("*/*.chunk")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, number)
        begun = time.monotonic()
        _, err = process.communicate(timeout=20)
        if process.returncode != 0:
            break
    assert process.returncode == 85, err
    assert time.monotonic() - begun < 3
    assert "on request" in err
    assert 0 < len(cached(run)) < 9375
    assert not list((tmp_path / "cache").glob("*/*.tmp"))


def test_it_loads_no_torch(run: Path) -> None:
    words = ["--node", "0", "--nodes", "1", "--ranks-per-node", "2", str(run)]
    code = (
        "import sys; from lmscale.cli.entry import run; code = run(['stage', *sys.argv[1:]]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=run.parent, timeout=60, check=False
    )
    assert done.returncode == 0
    assert cached(run)


def test_a_start_that_waits_for_another_one_can_be_ended(run: Path) -> None:
    from lmscale.corpus.node_cache import cache_lock
    from lmscale_launcher.stage import StagingTarget, stage

    cfg = load(run, [], cwd=run.parent)
    stop = threading.Event()
    with cache_lock(run.parent / "cache", threading.Event(), say=print):
        threading.Timer(0.5, stop.set).start()
        assert stage(cfg, StagingTarget(0, 1, 2), stop) == 85
    assert cached(run) == set()
