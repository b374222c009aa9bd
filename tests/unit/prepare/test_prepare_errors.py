import fcntl
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from lmscale.base.errors import ConfigError, DataError, LmscaleError, RetryableError, UsageError
from lmscale.corpus.manifest import corpus_folder
from lmscale.prepare import inputs, scratch
from lmscale.prepare.documents import documents
from lmscale.prepare.options import PrepareOptions
from lmscale.prepare.run import prepare
from tests.support.prepared_text import SMALL, nobody_can_be_denied, some_texts, write_lines

BIG = "\n".join(json.dumps({"text": text}) for text in some_texts(400)).encode()


def _refused(
    tmp_path: Path, name: str, content: bytes, kind: type[LmscaleError] = DataError
) -> str:
    """What prepare says of a file; OUT must not look like a corpus afterwards."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(kind) as caught:
        prepare(tmp_path / "out", [path], SMALL)
    with pytest.raises(DataError):
        corpus_folder(tmp_path / "out")
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "are empty"),
        ("a.jsonl", b"\n \n", "without any text"),
        ("a.jsonl", b'{"text": ""}\n', "without any text"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "without any text"),
        ("a.txt", b"good \xff bad", "not UTF-8 at byte 5 (0xff)"),
        ("a.txt", b"x" * (1 << 20) + b"\xc3", f"not UTF-8 at byte {1 << 20} (0xc3)"),
        ("a.txt", "x".encode("utf-16"), "not UTF-8 at byte 0"),
        ("a.txt", gzip.compress(b"text", mtime=0), "rename it to end in .gz"),
        ("a.txt", zstandard.compress(b"text"), "rename it to end in .zst"),
        ("a.txt.gz", gzip.compress(b"ab\xff", mtime=0), "not UTF-8 at byte 2 of the decompressed text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'["x"]\n', "line 1: contains a list, not an object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "no key 'text' (keys: 'body', 'id')"),
        ("a.jsonl", b'{"text": 3}\n', "key 'text' contains a number, not a text"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "character 1: half a surrogate pair (\\ud800)"),
        ("a.jsonl.gz", gzip.compress(BIG, mtime=0)[:-9], "truncated, the gzip stream has no end"),
        ("a.jsonl.zst", zstandard.compress(BIG)[:-9], "truncated, the zstd stream has no end"),
        ("a.jsonl.gz", b"not compressed", "damaged gzip data"),
        ("a.jsonl.zst", b"not compressed", "damaged zstd data"),
        ("a.jsonl.zst", zstandard.compress(BIG) + b"more", "damaged zstd data"),
        ("a.tar", b"x", ".tar is not supported"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    if words == "without any text":
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="documents without any text"):
            prepare(tmp_path / "out", [tmp_path / name], SMALL)
    else:
        assert words in _refused(tmp_path, name, content)


def test_damage_inside_gzip_is_noticed(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(BIG, mtime=0))
    content[len(content) // 2] ^= 0x10
    assert "download it again" in _refused(tmp_path, "a.jsonl.gz", bytes(content))


def test_the_line_number_is_right_in_every_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MIN_SLICE_BYTES", 500)
    lines = [json.dumps({"text": text}) for text in some_texts(50)]
    for bad in (0, 7, 31, 49):
        broken = [*lines[:bad], "{", *lines[bad + 1 :]]
        words = _refused(tmp_path, "a.jsonl", "\n".join(broken).encode())
        assert f"a.jsonl, line {bad + 1}: not JSON" in words


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda folder: [], UsageError, "no input"),
        (lambda folder: [folder / "absent"], UsageError, "no such file"),
        (lambda folder: [folder / "empty"], DataError, "the folder contains no files"),
        (lambda folder: [folder / "dangling"], DataError, "cannot be read"),
        (lambda folder: [folder / "pipes"], DataError, "not a regular file"),
        (lambda folder: [folder / "a.txt", folder / "a.txt"], UsageError, "given twice"),
        (lambda folder: [folder], UsageError, "contains the output"),
    ],
)
def test_inputs_that_cannot_be_are_refused(
    tmp_path: Path, make: Callable[[Path], list[Path]], kind: type[LmscaleError], words: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    for folder in ("empty", "dangling", "pipes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dangling/link.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipes/fifo")
    with pytest.raises(kind, match=words):
        prepare(tmp_path / "out", make(tmp_path), SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(nobody_can_be_denied(), reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        prepare(tmp_path / "out", [tmp_path / "a.txt"], SMALL)


def test_a_denied_open_is_explained_for_root_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inputs, "open", denied, raising=False)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        prepare(tmp_path / "out", [tmp_path / "a.txt"], SMALL)


def test_a_read_that_fails_may_succeed_later() -> None:
    """/proc/self/mem opens and fails to read with EIO, as a bad disk does."""
    facts = os.stat("/proc/self/mem")
    source = inputs.InputFile("/proc/self/mem", "text", "", facts.st_size, facts.st_mtime_ns)
    work = inputs.Slice(0, (inputs.Span(source, 0, 0),))
    reading = documents(work, "text")
    document = next(reading)
    with pytest.raises(RetryableError, match="/proc/self/mem: reading failed: Input/output error"):
        list(document)


def test_input_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", some_texts(20))
    plan = inputs.slices(inputs.discover([path], tmp_path / "out"))
    path.write_bytes(path.read_bytes() + b"\n")
    monkeypatch.setattr("lmscale.prepare.run.slices", lambda _: plan)
    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare(tmp_path / "out", [path], SMALL)


def test_an_out_that_is_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="is not empty"):
        prepare(tmp_path / "out", [tmp_path / "a.txt"], SMALL)
    with pytest.raises(UsageError, match="is a file"):
        prepare(tmp_path / "out/thesis.tex", [tmp_path / "a.txt"], SMALL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_second_run_at_the_same_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_LOCK_TIMEOUT_S", 0.1)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out/.prepare").mkdir(parents=True)
    with (tmp_path / "out/.prepare/lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another `lmscale prepare` is running"):
            prepare(tmp_path / "out", [tmp_path / "a.txt"], SMALL)


def test_a_tokenizer_that_cannot_frame_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="no such file"):
        prepare(tmp_path / "out", [tmp_path / "a.txt"], PrepareOptions(tokenizer="bytez"))
    prepare(tmp_path / "one", [tmp_path / "a.txt"], SMALL)
    file = tmp_path / "one/train/tokenizer.json"
    file.write_text(file.read_text().replace("<bos>", "<a>").replace("<eos>", "<b>"))
    with pytest.raises(ConfigError, match="tokenizer_config"):
        prepare(tmp_path / "out", [tmp_path / "a.txt"], PrepareOptions(tokenizer=str(file)))
