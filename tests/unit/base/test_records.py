"""Lines against a spec, ends of files, following. Cuts and torn lines: tests/unit/run_folder."""

import json
import os
import signal
from pathlib import Path
from typing import TypedDict

import pytest

from lmscale.base import records
from lmscale.base.errors import DataError
from lmscale.base.fs import UnsuitableFile
from lmscale.base.records import (
    FollowedFile,
    LineFile,
    decode_lines,
    ends_of,
    first_line,
    newest_lines,
    read_lines,
    readable_lines,
)


class Step(TypedDict):
    """A line of metrics."""

    step: int


ODD = (b"{}\n", b'{"step": "1"}\n', b'{"step": 1, "step": 2}\n', b'{"step": NaN}\n', b"[]\n",
       b"\xff\n", b'{"step": ' + b"9" * 5000 + b"}\n", b"[" * 100_000 + b"\n")  # fmt: skip


def test_lines_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = [b'{"step": 1, "more": [1]}\n', b'{"step": 2}\n']
    path.write_bytes(good[0] + b"".join(ODD) + b"\n" + good[1] + b'{"step": 3')
    want = [{"step": 1, "more": [1]}, {"step": 2}]
    assert list(readable_lines(path, Step)) == want
    assert decode_lines(path.read_bytes().split(b"\n"), Step) == want
    assert newest_lines(path, 1) == [{"step": 2}]
    assert first_line(path, Step, max_bytes=100) == want[0]
    assert ends_of(path, Step, head_bytes=30, tail_bytes=30) == want
    assert ends_of(path, Step, head_bytes=1 << 20, tail_bytes=1 << 20) == want
    with pytest.raises(DataError, match="line 4"):
        list(read_lines(path))


def test_a_line_without_end_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"x" * 100_000 + b'\n{"step": 2}\n' + b"y" * 100_000)
    assert list(readable_lines(path)) == [{"step": 1}, {"step": 2}]
    LineFile.cut(path, lambda line: True).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    os.mkfifo(path)
    signal.alarm(10)
    try:
        for read in (
            lambda: list(readable_lines(path)),
            lambda: newest_lines(path, 1),
            lambda: ends_of(path, head_bytes=1, tail_bytes=1),
            lambda: FollowedFile(path).lines(),
        ):
            with pytest.raises(UnsuitableFile):
                read()
    finally:
        signal.alarm(0)
    absent = tmp_path / "absent"
    assert list(readable_lines(absent)) == newest_lines(absent, 3) == []
    assert FollowedFile(absent).lines() == []


def test_a_cut_file_is_appended_to_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with LineFile(path) as old:
        for step in range(3):
            old.append({"step": step})
    with LineFile.cut(path, lambda line: line["step"] < 2) as new, LineFile(path) as other:
        new.append({"step": 10})
        other.append({"step": 11})
        new.append({"step": 12})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        0,
        1,
        10,
        11,
        12,
    ]
    assert os.listdir(tmp_path) == ["x.jsonl"]
