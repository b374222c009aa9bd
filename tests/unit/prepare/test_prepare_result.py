import os
from pathlib import Path

import pytest

from lmscale.base.errors import LmscaleError, UsageError
from lmscale.cli.entry import run as run_verb
from lmscale.corpus.integrity import verify
from lmscale.corpus.manifest import Manifest
from lmscale.prepare import inputs, tokenize
from lmscale.prepare.options import PrepareOptions
from lmscale.prepare.pass_progress import PrepareProgress
from lmscale.prepare.run import prepare
from lmscale.tokenizer.tokenizer import Tokenizer
from tests.support.prepared_text import (
    SMALL,
    contents,
    read_documents,
    run,
    some_texts,
    write_lines,
)


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MIN_SLICE_BYTES", 2000)
    monkeypatch.setattr(tokenize, "SEGMENT_TOKENS", 500)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what a power cut leaves is not asked here


def _mixed(folder: Path) -> tuple[list[Path], list[str]]:
    """One input of each kind, and its documents in order."""
    texts = some_texts(60)
    (folder / "tree/b").mkdir(parents=True)
    (folder / "tree/a.py").write_text(texts[0])
    (folder / "tree/b/z.txt").write_bytes(b"\xef\xbb\xbf" + texts[1].encode())
    (folder / "tree/.hidden").write_text("left out")
    (folder / "tree/c").write_text(texts[2])
    given = [
        folder / "tree",
        write_lines(folder / "plain.jsonl", texts[3:30]),
        write_lines(folder / "packed.jsonl.gz", texts[30:45]),
        write_lines(folder / "packed.jsonl.zst", texts[45:]),
    ]
    return given, texts


def test_every_document_comes_back_in_its_part_and_in_order(tmp_path: Path) -> None:
    given, texts = _mixed(tmp_path)
    summary = prepare(tmp_path / "out", given, SMALL)
    held = [text for i, text in enumerate(texts) if i % 10 == 9]
    kept = [text for i, text in enumerate(texts) if i % 10 != 9]
    assert read_documents(tmp_path / "out/train") == kept
    assert read_documents(tmp_path / "out/heldout") == held
    assert verify(tmp_path / "out") == []
    assert summary.parts["train"] == Manifest.load(tmp_path / "out/train")
    assert summary.parts["train"].documents == len(kept)
    assert summary.parts["train"].text_bytes == sum(len(text.encode()) for text in kept)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "heldout", "manifest.json", "train",
    ]  # fmt: skip


def test_the_bytes_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    given, _ = _mixed(tmp_path)
    for workers in (1, 2, 3):
        done = run(
            tmp_path / f"out{workers}", *given, "--workers", str(workers), "--tokenizer", "bpe:400",
            "--chunk-tokens", "64", "--shard-chunks", "8", "--heldout", "10%",
        )  # fmt: skip
        assert (done.returncode, "next: lmscale train" in done.stdout) == (0, True), done.stderr
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") == contents(tmp_path / "out3")
    assert len(list((tmp_path / "out1/train").glob("*.tar"))) > 3
    assert Manifest.load(tmp_path / "out1/train").tokenizer.vocab_size <= 400


def test_the_bytes_do_not_depend_on_names_or_times_of_the_input(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", some_texts(30))
    prepare(tmp_path / "one", [first], SMALL)
    prepare(tmp_path / "two", [first.rename(tmp_path / "b.jsonl")], SMALL)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(("count", "every", "held"), [(1, 10, []), (2, 10, [1]), (9, 10, [8]),
                                                      (10, 10, [9]), (25, 10, [9, 19]), (4, 0, [])])  # fmt: skip
def test_held_out_rule(tmp_path: Path, count: int, every: int, held: list[int]) -> None:
    texts = [f"text {i}" for i in range(count)]
    share = 1 / every if every else 0
    prepare(
        tmp_path / "out", [write_lines(tmp_path / "a.jsonl", texts)],
        PrepareOptions(tokenizer="bytes", heldout=share, workers=1),
    )  # fmt: skip
    assert read_documents(tmp_path / "out/train") == [
        texts[i] for i in range(count) if i not in held
    ]
    if held:
        assert read_documents(tmp_path / "out/heldout") == [texts[i] for i in held]
    assert (tmp_path / "out/heldout").exists() == bool(held)


def test_a_second_call_is_content_with_the_same_input_and_refuses_any_other(tmp_path: Path) -> None:
    text = write_lines(tmp_path / "a.jsonl", some_texts(30))
    assert not prepare(tmp_path / "out", [text], SMALL).already
    before = contents(tmp_path / "out")
    text.touch()
    assert prepare(tmp_path / "out", [text], SMALL).already
    assert contents(tmp_path / "out") == before
    with pytest.raises(UsageError, match="heldout_every 10, now 100"):
        prepare(
            tmp_path / "out",
            [text],
            PrepareOptions(tokenizer="bytes", chunk_tokens=64, shard_chunks=3),
        )
    write_lines(text, some_texts(30, seed=1))
    with pytest.raises(UsageError, match="made from other input"):
        prepare(tmp_path / "out", [text], SMALL)
    assert contents(tmp_path / "out") == before


def test_a_tokenizer_file_gives_the_corpus_its_ids(tmp_path: Path) -> None:
    text = write_lines(tmp_path / "a.jsonl", some_texts(30))
    trained = PrepareOptions(tokenizer="bpe:300", chunk_tokens=64, shard_chunks=3, workers=1)
    prepare(tmp_path / "one", [text], trained)
    given = PrepareOptions(
        tokenizer=str(tmp_path / "one/train/tokenizer.json"),
        chunk_tokens=64,
        shard_chunks=3,
        workers=1,
    )
    prepare(tmp_path / "two", [text], given)
    assert contents(tmp_path / "one/train") == contents(tmp_path / "two/train")
    assert Tokenizer.load(tmp_path / "two/heldout/tokenizer.json").vocab_size == 300


def test_long_documents_are_encoded_in_pieces_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(some_texts(200))
    (tmp_path / "long.txt").write_text(text)
    prepare(tmp_path / "whole", [tmp_path / "long.txt"], SMALL)
    monkeypatch.setattr("lmscale.tokenizer.training.split_text.__defaults__", (100,))
    monkeypatch.setattr("lmscale.prepare.documents._BLOCK_BYTES", 37)
    prepare(tmp_path / "cut", [tmp_path / "long.txt"], SMALL)
    assert read_documents(tmp_path / "cut/train") == [text]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_progress_rises_to_the_total_of_each_stage(tmp_path: Path) -> None:
    given, _ = _mixed(tmp_path)
    heard: list[PrepareProgress] = []
    options = PrepareOptions(tokenizer="bpe:300", chunk_tokens=64, shard_chunks=3, workers=1)
    prepare(tmp_path / "out", given, options, heard.append)
    stages = list(dict.fromkeys(each.stage for each in heard))
    assert stages == ["train tokenizer", "tokenize", "write train", "write heldout"]
    for stage in stages:
        done = [each.done for each in heard if each.stage == stage]
        assert done == sorted(done) and done[0] == 0
        assert done[-1] == max(each.total for each in heard if each.stage == stage)


def test_command_line_prints_json_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_lines(tmp_path / "a.jsonl", some_texts(30))
    arguments = [
        "prepare",
        str(tmp_path / "out"),
        str(text),
        "--tokenizer",
        "bytes",
        "--workers",
        "1",
        "--json",
    ]
    assert run_verb(arguments) == 0
    assert '"vocab_size": 272' in capsys.readouterr().out
    assert run_verb([*arguments, "--heldout", "five"]) == 2
    assert "--heldout five: write a share, e.g. 1%" in capsys.readouterr().err
    assert run_verb(["prepare", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    "flags",
    [{"chunk_tokens": 0}, {"shard_chunks": 0}, {"heldout": 0.6}, {"heldout": -0.1}, {"workers": -1},
     {"tokenizer": "bpe:10"}, {"tokenizer": "bpe:big"}],
)  # fmt: skip
def test_options_are_checked_before_anything_is_read(flags: dict[str, int]) -> None:
    with pytest.raises(LmscaleError, match="--"):
        PrepareOptions(**flags)  # type: ignore[arg-type]
