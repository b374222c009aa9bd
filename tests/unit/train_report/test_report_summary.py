import pytest

from lmscale.train.report.read import read_record
from lmscale.train.report.summary import status, tiles, verdict


def told(folder) -> str:
    return " ".join(verdict(read_record(folder)))


def test_the_verdict_compares_with_both_baselines(folder) -> None:
    folder.write_metrics(100)
    folder.write_eval("held", {50: 2.0, 100: 1.5}, unigram=3.0, bigram=2.0)
    text = told(folder)
    assert "After 100 steps and 100K tokens" in text
    assert "*1.500* bits per byte" in text
    assert "50 % below the 3.000" in text and "25 % below the 2.000" in text
    assert "best" not in text  # the last is the best


def test_the_verdict_does_not_flatter(folder) -> None:
    folder.write_metrics(100)
    folder.write_eval("held", {50: 1.0, 100: 2.4}, unigram=3.0, bigram=2.0)
    text = told(folder)
    assert "20 % above the 2.000" in text
    assert "The best was 1.000 at step 50" in text


def test_a_loss_that_is_not_finite_is_said(folder) -> None:
    folder.write_metrics(100, loss=lambda step: None if step > 90 else 3.0)
    text = told(folder)
    assert "the training loss is *not finite*" in text
    assert "not finite at 10 of the steps" in text


def test_nothing_measured_is_said(folder) -> None:
    assert told(folder) == "No step has finished yet."
    folder.write_metrics(1)
    assert told(folder) == (
        "After 1 step and 1K tokens the training loss is *6.000* nats per token. "
        "No validation was measured."
    )


@pytest.mark.parametrize(
    ("steps", "events", "text", "mood"),
    [
        (100, [], "finished", "good"),
        (40, [], "at step 40 of 100", ""),
        (40, [{"kind": "stop", "code": 85}], "saved and stopped on request", ""),
        (40, [{"kind": "stop", "code": 0}], "stopped at step 40", ""),
        (40, [{"kind": "stop", "code": 86}], "diverged", "bad"),
        (40, [{"kind": "exit", "code": 137}], "died by signal 9", "bad"),
        (40, [{"kind": "stop"}], "stopped at step 40", ""),
    ],
)
def test_status(folder, steps: int, events: list, text: str, mood: str) -> None:
    folder.write_metrics(steps)
    folder.write_events(
        "a", [{"kind": "start", "time": 1.0}, *({**e, "time": 2.0} for e in events)]
    )
    found = status(read_record(folder))
    assert (found.text, found.mood) == (text, mood)


def test_an_older_start_does_not_speak_for_the_newest(folder) -> None:
    folder.write_metrics(40)
    folder.write_events(
        "a", [{"kind": "start", "time": 1}, {"kind": "stop", "time": 2, "code": 86}]
    )
    folder.write_events("b", [{"kind": "start", "time": 3}])
    assert status(read_record(folder)).text == "at step 40 of 100"


def test_tiles(folder) -> None:
    folder.write_metrics(100, mfu=lambda step: 0.4)
    folder.write_eval("held", {50: 1.4, 100: 1.5})
    folder.write_events("a", [{"kind": "start", "time": 1000}, {"kind": "stop", "time": 1060}])
    # an hour in the queue is not wall time
    folder.write_events("b", [{"kind": "start", "time": 5000}, {"kind": "stop", "time": 5005}])
    found = {tile.label: (tile.value, tile.below) for tile in tiles(read_record(folder))}
    assert found["Steps"] == ("100", "of 100")
    assert found["Tokens"] == ("100K", "1K per step")
    assert found["Wall time"] == ("1m05s", "50s in steps")
    assert found["Tokens/s"][0] == "2K" and "40.0" in found["Tokens/s"][1]
    assert found["Parameters"][0] == "–"
    assert found["Best validation"][0] == "1.400"
