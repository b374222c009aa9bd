"""Properties of the pieces that make the result a function of the input alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmscale.prepare import inputs
from lmscale.prepare.cuts import HELDOUT, TRAIN, PartStream, compute_cuts, heldout_mask
from lmscale.prepare.documents import documents, sample_text
from lmscale.prepare.inputs import discover, slices
from lmscale.prepare.scratch import Scratch
from lmscale.prepare.tokenize import Segment

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(total=st.integers(1, 60), every=st.sampled_from([0, 2, 3, 10, 100]))
@quick
def test_held_out_documents_are_every_nth_and_at_least_the_last(total: int, every: int) -> None:
    mask = heldout_mask(0, total, every=every, total=total)
    want = [bool(every) and i % every == every - 1 for i in range(total)]
    if every and total >= 2 and not any(want):
        want[-1] = True
    assert mask.tolist() == want
    parts = [heldout_mask(i, 1, every=every, total=total)[0] for i in range(total)]
    assert parts == want


@given(data=st.data())
@quick
def test_any_stretch_of_a_part_is_that_of_its_documents_end_to_end(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.lists(st.integers(1, 6), max_size=7), min_size=1, max_size=4))
    every = data.draw(st.sampled_from([0, 2, 3, 5]))
    scratch = Scratch(tmp_path_factory.mktemp("scratch"))
    scratch.slices.mkdir()
    segments, whole, token = [], {TRAIN: [], HELDOUT: []}, 0
    total, index = sum(map(len, lengths)), 0
    for number, row in enumerate(lengths):
        tokens = np.arange(token, token + sum(row), dtype="<u2")
        tokens.tofile(scratch.segment(number, 0, "tokens"))
        np.array([[n, 2 * n] for n in row], np.int64).tofile(
            scratch.segment(number, 0, "documents")
        )
        segments.append(Segment(number, 0, len(row), sum(row), 2 * sum(row), 0, 0))
        for length in row:
            held = bool(heldout_mask(index, 1, every=every, total=total)[0])
            whole[HELDOUT if held else TRAIN].append(list(range(token, token + length)))
            token, index = token + length, index + 1
    cuts = compute_cuts(segments, scratch, every=every)
    assert set(cuts.sizes) == {part for part, kept in whole.items() if kept}
    for part, size in cuts.sizes.items():
        flat = [token for document in whole[part] for token in document]
        assert (size.documents, size.tokens) == (len(whole[part]), len(flat))
        assert size.text_bytes == 2 * len(flat)
        start = data.draw(st.integers(0, len(flat) - 1))
        stop = data.draw(st.integers(start + 1, len(flat)))
        tokens, begins = PartStream(scratch, cuts, part, np.dtype("<u2")).read(start, stop)
        assert tokens.tolist() == flat[start:stop]
        firsts = np.cumsum([0, *(len(document) for document in whole[part])])[:-1]
        assert begins.tolist() == [first - start for first in firsts if start <= first < stop]


@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=30), size=st.integers(1, 200))
@quick
def test_slices_of_json_lines_hold_each_line_once_and_in_order(
    tmp_path: Path, texts: list[str], size: int
) -> None:
    path = tmp_path / "a.jsonl"
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    path.write_text(
        "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), newline=""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "MIN_SLICE_BYTES", size)
        work = slices(discover([path], tmp_path / "out"))
    assert [each.number for each in work] == list(range(len(work)))
    assert sum(each.size for each in work) == path.stat().st_size
    found = ["".join(document) for each in work for document in documents(each, "text")]
    assert found == texts


def test_folders_are_read_by_path_whatever_the_disk_says(tmp_path: Path) -> None:
    for name in ("b/1.txt", "a/2.txt", "a.txt", "a/10.txt", "é.txt", ".git/x", "a/.x"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    found = discover([tmp_path / "in"], tmp_path / "out")
    names = [str(Path(source.path).relative_to(tmp_path / "in")) for source in found]
    assert names == ["a/10.txt", "a/2.txt", "a.txt", "b/1.txt", "é.txt"]


@pytest.mark.parametrize("count", [1, 9, 30])
def test_the_sample_is_everything_or_an_even_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(inputs, "MIN_SLICE_BYTES", 100)
    for index in range(count):
        (tmp_path / f"{index:02d}.txt").write_text(f"{index:02d}é" * 30)
    paths = sorted(tmp_path.glob("*.txt"))
    work = slices(discover(paths, tmp_path / "out"))
    heard: list[int] = []
    whole = "".join(path.read_text() for path in paths)
    assert "".join(sample_text(work, "text", heard.append)) == whole
    assert heard[-1] == len(whole.encode())
    shares = list(sample_text(work, "text", heard.append, limit=count * 10))
    assert shares == [f"{index:02d}é" * 2 + f"{index:02d}"[:2] for index in range(count)]


def test_slices_of_a_large_input_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SimpleNamespace(format="lines", compression="", size=1 << 40)
    work = slices([source])  # type: ignore[list-item]
    assert len(work) == inputs.MAX_SLICES
    assert sum(each.size for each in work) == 1 << 40
