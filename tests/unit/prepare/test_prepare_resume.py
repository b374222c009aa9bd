import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from lmscale.base.errors import DataError
from lmscale.corpus.integrity import verify
from lmscale.corpus.manifest import corpus_folder
from lmscale.prepare import inputs
from lmscale.prepare import run as passes
from lmscale.prepare.options import PrepareOptions
from lmscale.prepare.run import prepare
from tests.support.prepared_text import SMALL, command, contents, run, some_texts, write_lines

FLAGS = ["--tokenizer", "bpe:400", "--chunk-tokens", "64", "--shard-chunks", "16", "--workers", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("input") / "a.jsonl", some_texts(300))


@pytest.fixture(scope="module")
def want(source: Path) -> dict[str, bytes]:
    out = source.parent / "undisturbed"
    assert run(out, source, *FLAGS, slice_bytes=6_000).returncode == 0
    return contents(out)


def _started(out: Path, source: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(out, source, *FLAGS, slice_bytes=6_000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _until(happened: object, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 30
    while not happened() and process.poll() is None and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.002)


def _interrupted(out: Path, source: Path, *, when: str, victim: str) -> bool:
    """Start a run and kill all of it, or a worker, when a file appears; False if it had no work left by then."""
    process = _started(out, source)
    _until((out / ".prepare" / when).exists, process)
    process.send_signal(signal.SIGSTOP)  # so that the scene does not change while we look at it
    workers = psutil.Process(process.pid).children()  # the second may not have been started yet
    if victim == "all" and workers:  # the parent only: its workers must not outlive it
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=5)
        assert not alive
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        return not (out / "manifest.json").exists()
    for worker in workers[:1]:
        worker.kill()
    process.send_signal(signal.SIGCONT)
    _, messages = process.communicate()
    if process.returncode == 0:
        return False
    assert process.returncode == 75
    assert "a worker process died (signal 9)" in messages
    return True


@pytest.mark.parametrize("victim", ["all", "worker"])
@pytest.mark.parametrize("when", ["slices/000003.json", "train-entries/000001.json"])
def test_killed_in_the_middle_the_same_command_gives_the_same_bytes(
    tmp_path: Path, source: Path, want: dict[str, bytes], when: str, victim: str
) -> None:
    out = tmp_path / "out"
    # On a busy machine this test may be scheduled again only when no work is left to interrupt: then it starts again.
    while not _interrupted(out, source, when=when, victim=victim):
        shutil.rmtree(out)
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError):
        corpus_folder(out)
    again = run(out, source, *FLAGS, slice_bytes=6_000)
    assert again.returncode == 0, again.stderr
    assert "resuming where an earlier run stopped" in again.stderr
    assert contents(out) == want


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_a_bit_that_flips_while_nobody_runs_is_not_sealed(
    tmp_path: Path, source: Path, want: dict[str, bytes], kind: str
) -> None:
    out = tmp_path / "out"
    killed = _started(out, source)
    # the first slice itself: slices end in any order, and only a finished one is believed
    _until((out / ".prepare" / "slices" / "000000.json").exists, killed)
    killed.kill()
    killed.communicate()
    scratch = out / ".prepare" / "slices" / f"000000-0000.{kind}"
    data = bytearray(scratch.read_bytes())
    data[len(data) // 2] ^= 1
    scratch.write_bytes(data)
    again = run(out, source, *FLAGS, slice_bytes=6_000)
    assert again.returncode == 0, again.stderr
    assert contents(out) == want


@pytest.mark.parametrize("place", range(4))
def test_cut_between_the_last_renames_the_same_call_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """After the first manifest, the first move, the second part, the collection's manifest."""
    text = write_lines(tmp_path / "a.jsonl", some_texts(30))
    prepare(tmp_path / "want", [text], SMALL)

    class Cut(BaseException):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        if place == 0:
            patch.setattr(
                Path,
                "rename",
                lambda path, to: stop() if path.is_dir() else os.rename(path, to),
            )
        elif place == 1:
            real = passes.write_part
            patch.setattr(
                passes,
                "write_part",
                lambda r, c, p, t: real(r, c, p, t) if p == "train" else stop(),
            )
        elif place == 2:
            patch.setattr(passes, "Collection", stop)
        else:
            real = shutil.rmtree
            patch.setattr(
                shutil,
                "rmtree",
                lambda path, **k: stop() if path.name == ".prepare" else real(path, **k),
            )
        with pytest.raises(Cut):
            prepare(tmp_path / "out", [text], SMALL)
    summary = prepare(tmp_path / "out", [text], SMALL)
    assert summary.already == (place == 3)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_other_input_or_options_start_anew_and_leave_nothing_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MIN_SLICE_BYTES", 500)
    text = write_lines(tmp_path / "a.jsonl", some_texts(40))
    with monkeypatch.context() as patch:
        patch.setattr(passes, "Collection", None)
        with pytest.raises(TypeError):
            prepare(tmp_path / "out", [text], SMALL)
    assert (tmp_path / "out/heldout").exists()
    none = PrepareOptions(tokenizer="bytes", chunk_tokens=64, shard_chunks=3, heldout=0, workers=1)
    prepare(tmp_path / "out", [text], none)
    prepare(tmp_path / "want", [text], none)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert not (tmp_path / "out/heldout").exists()


def test_a_scratch_file_cut_short_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_lines(tmp_path / "a.jsonl", some_texts(40))
    prepare(tmp_path / "want", [text], SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(passes, "compute_cuts", None)
        with pytest.raises(TypeError):
            prepare(tmp_path / "out", [text], SMALL)
    tokens = tmp_path / "out/.prepare/slices/000000-0000.tokens"
    os.truncate(tokens, tokens.stat().st_size - 1)
    prepare(tmp_path / "out", [text], SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


@pytest.mark.parametrize("limit", [2_000, 12_000])  # too small for a slice's ids; for a shard
def test_a_full_disk_is_explained_and_the_run_goes_on_with_more_room(
    tmp_path: Path, limit: int
) -> None:
    """A limit on file sizes fails a write as a full disk does, without the right to mount one."""
    texts = [text * 3 for text in some_texts(60)]
    source = write_lines(tmp_path / "a.jsonl", texts)
    arguments = [
        tmp_path / "out",
        source,
        "--tokenizer",
        "bytes",
        "--chunk-tokens",
        "4096",
        "--workers",
        "2",
    ]
    full = subprocess.run(
        command(*arguments, slice_bytes=3_000),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert full.returncode == 75, full.stderr
    assert "free some space" in full.stderr or "the disk is full" in full.stderr
    assert not (tmp_path / "out/manifest.json").exists()
    assert not list((tmp_path / "out").rglob("*.tar.tmp"))
    assert run(*arguments, slice_bytes=3_000).returncode == 0
    assert run(tmp_path / "want", *arguments[1:], slice_bytes=3_000).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small tmpfs here")
    try:
        source = write_lines(tmp_path / "a.jsonl", [text * 40 for text in some_texts(40)])
        arguments = [disk / "out", source, "--tokenizer", "bytes", "--workers", "1"]
        full = run(*arguments)
        assert full.returncode == 75, full.stderr
        assert "No space left on device" in full.stderr
        assert not (disk / "out/manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert run(*arguments).returncode == 0
        assert verify(disk / "out") == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_ctrl_c_ends_the_workers_and_says_how_to_go_on(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(out, source, *FLAGS, slice_bytes=6_000), stderr=subprocess.PIPE, text=True
    )
    _until((out / ".prepare/slices/000000.json").exists, process)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=10)
    assert process.returncode == 85
    assert "it resumes where it stopped" in words
    assert "Traceback" not in words
    assert not psutil.wait_procs(workers, timeout=5)[1]
