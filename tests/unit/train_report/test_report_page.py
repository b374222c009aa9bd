import json
import re
from html.parser import HTMLParser

import pytest

from lmscale.train.report.page import marks, write_report
from lmscale.train.report.read import read_record

VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Fails on tags that do not close; collects text, ids and everything that points elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.pointers: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.pointers.append(value)

    def handle_startendtag(self, tag, attributes) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["title"]):
            self.text += data


def page_of(folder) -> Page:
    path = write_report(folder)
    assert path == folder.report
    return Page(path.read_text())


def full(folder) -> None:
    folder.write_metrics(100, mfu=lambda step: 0.4)
    folder.write_eval("held", {50: 2.0, 100: 1.5}, unigram=3.0, bigram=2.0)
    folder.write_events(
        "a",
        [
            {"kind": "start", "time": 1, "host": "n1", "ranks": 2},
            {"kind": "environment", "time": 1, "torch": "2.13", "device": "CPU"},
            {"kind": "attempt", "time": 2, "attempt": 1, "from_step": 0},
            {"kind": "save", "time": 3, "step": 40},
        ],
    )
    folder.write_events(
        "b",
        [
            {"kind": "start", "time": 11, "host": "n2", "ranks": 2},
            {"kind": "attempt", "time": 12, "attempt": 2, "from_step": 40},
            {"kind": "save", "time": 14, "step": 100},
            {"kind": "sample", "time": 15, "step": 100, "prompt": "Once", "text": " upon a time"},
            {"kind": "stop", "time": 16, "code": 0},
        ],
    )


def test_all_parts_are_there(folder) -> None:
    full(folder)
    page = page_of(folder)
    for part in (
        "tales", "finished", "Loss", "Validation on held", "unigram 3.000", "bigram 2.000",
        "model 1.500", "Learning rate", "Gradient norm", "Throughput", "MFU", "restart",
        "Sampled text", "Once upon a time", "Validation results", "Environment", "2.13",
        "Attempts", "died without an exit event", "n1", "Configuration", "layers: 2", "Events",
    ):  # fmt: skip
        assert part in page.text, part
    assert page.seen.count("svg") == 6


def test_the_page_needs_nothing_but_itself(folder) -> None:
    full(folder)
    page = page_of(folder)
    text = folder.report.read_text()
    assert "script" not in page.seen and "link" not in page.seen and "img" not in page.seen
    assert all(pointer.startswith("#") for pointer in page.pointers)
    assert {pointer[1:] for pointer in page.pointers} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\((?!#)|@import", text)
    assert "#0a0b0c" not in text  # the placeholder of the page's text colour
    for target in re.findall(r"url\(#([^)]+)\)", text):
        assert target in page.ids


def test_the_same_files_give_the_same_bytes(folder) -> None:
    full(folder)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "config.yaml", "eval.jsonl", "events", "metrics.jsonl", "report.html",
    ]  # fmt: skip


def test_text_of_a_run_cannot_become_markup(folder) -> None:
    evil = "<script>alert('x')</script> & </pre> *$verdict ${name}"
    folder.write_metrics(3)
    folder.config.write_text(f"# {evil}\n")
    folder.write_eval(evil, {1: 2.0, 3: 1.0}, unigram=3.0)
    folder.write_events(
        "a",
        [
            {"kind": "sample", "time": 1, "prompt": evil, "text": evil},
            {"kind": "environment", "time": 1, evil: evil},
            {"kind": "attempt", "time": 1, "attempt": 1, "from_step": 0},
            {"kind": evil, "time": 1, "reason": evil, "more": {evil: [evil]}},
            {"kind": "stop", "time": 2, "reason": evil},
        ],
    )
    page = page_of(folder)
    assert "script" not in page.seen
    assert page.text.count("alert('x')") >= 6
    assert "$verdict" in page.text


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_run_of_hardly_any_steps_without_anything_else(folder, steps: int) -> None:
    folder.config.unlink()
    if steps:
        folder.write_metrics(steps)
    page = page_of(folder)
    assert ("Loss" in page.text) == (steps > 0)
    for absent in ("Validation results", "Environment", "Attempts", "Events", "MFU", "Sampled"):
        assert absent not in page.text


@pytest.mark.parametrize("unknown", [None, "text", [1]])
def test_unknown_values_leave_gaps_not_errors(folder, unknown: object) -> None:
    names = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "tokens")
    folder.write_metrics(60, **{name: lambda _, value=unknown: value for name in names})
    score = {"corpus": "held", "metric": "loss", "value": unknown, "count": 1}
    folder.write(folder.eval, ({"step": step, **score} for step in (30, 60)))
    folder.write_events("a", [{"kind": "save", "time": unknown, "step": unknown}])
    page = page_of(folder)
    assert "not finite" in page.text and "MFU" not in page.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_line_that_is_not_json_is_left_out(folder, value: float) -> None:
    folder.write_metrics(60, loss=lambda step: value if step == 30 else 2.0)
    assert "After 60 steps" in page_of(folder).text


def test_who_wrote_an_event_is_not_repeated_on_every_row(folder) -> None:
    full(folder)
    text = page_of(folder).text
    assert "987,654" not in text and "ticks" not in text
    assert text.count("4,242") == 4  # two starts, in the table of attempts and in that of events


def test_a_torn_line_and_a_line_written_twice(folder) -> None:
    folder.write_metrics(10)
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 9.0}) + "\n" + '{"step": 11, "lo')
    record = read_record(folder)
    assert list(record.steps) == list(range(1, 11))
    assert record.columns["loss"][3] == 9.0
    folder.metrics.write_text("\x00\x00\n" + folder.metrics.read_text())
    assert len(read_record(folder).steps) == 10


def test_marks_are_saves_and_resumed_attempts(folder) -> None:
    full(folder)
    found = marks(read_record(folder))
    assert (found.saves, found.restarts) == ([40, 100], [40])


def test_a_long_run_stays_a_small_file(folder) -> None:
    steps = 20_000
    folder.write_metrics(
        steps, loss=lambda s: 2 + (s * 7919 % 1000) / 5000, grad_norm=lambda s: s * 31 % 17
    )
    for corpus in ("a", "b"):
        folder.write_eval(corpus, {s: 1.5 for s in range(10, steps + 1, 10)})
    events = [{"kind": "save", "time": s, "step": s, "path": "x" * 30} for s in range(1, steps, 4)]
    folder.write_events("a", events)
    assert write_report(folder).stat().st_size < 1_000_000


def test_a_failed_write_leaves_the_old_report(folder, monkeypatch) -> None:
    full(folder)
    before = write_report(folder).read_bytes()
    folder.write_metrics(50)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmscale.base.fs.os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(folder)
    assert folder.report.read_bytes() == before
    assert not list(folder.path.glob(".report*"))
