import math

import pytest
import torch

from lmscale.base.errors import Diverged
from lmscale.engine.step import StepResult
from lmscale.train.callbacks import Line, Recorder


def result(loss: float, *, applied: bool = True) -> StepResult:
    as_tensor = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    return StepResult(as_tensor(loss), as_tensor(10.0), as_tensor(1.0), torch.tensor(applied))


def recorder(lines: list[Line], *, max_nonfinite_steps: int = 0) -> Recorder:
    made = Recorder(
        [lines.append], seq_len=4, max_nonfinite_steps=max_nonfinite_steps, mfu_at=lambda rate: None
    )
    made.resume(position=0, updates=0, skipped=0)
    return made


def test_a_line_comes_one_step_late_and_flush_brings_the_last() -> None:
    lines: list[Line] = []
    record = recorder(lines)
    record.note(step=1, position=8, lr=0.1, result=result(2.0))
    assert lines == []
    record.note(step=2, position=16, lr=0.2, result=result(1.0))
    assert [line["step"] for line in lines] == [1]
    record.flush()
    record.flush()
    assert [(line["step"], line["loss"], line["tokens"]) for line in lines] == [
        (1, 2, 32),
        (2, 1, 64),
    ]
    assert record.updates == 2


def test_a_pause_is_left_out_of_the_speed() -> None:
    lines: list[Line] = []
    record = recorder(lines)
    record.pause(-1000.0)  # as if the step had begun a thousand seconds earlier
    record.note(step=1, position=8, lr=0.1, result=result(2.0))
    record.flush()
    assert lines[0]["tokens_per_s"] == pytest.approx(32 / 1000, rel=0.01)


def test_not_finite_is_null_and_diverges_after_the_allowed_skips() -> None:
    lines: list[Line] = []
    record = recorder(lines, max_nonfinite_steps=1)
    record.note(step=1, position=8, lr=0.1, result=result(math.nan, applied=False))
    record.note(step=2, position=16, lr=0.1, result=result(1.0))
    assert lines[-1]["loss"] is None
    assert record.skipped == 1
    record.note(step=3, position=24, lr=0.1, result=result(math.inf, applied=False))
    assert record.skipped == 0, "a good step in between begins a new count"
    record.note(step=4, position=32, lr=0.1, result=result(math.inf, applied=False))
    with pytest.raises(Diverged, match=r"step 4.*optim\.lr"):
        record.flush()
    assert [line["step"] for line in lines] == [1, 2, 3, 4], "the line of the last step is written"
    assert record.updates == 1
