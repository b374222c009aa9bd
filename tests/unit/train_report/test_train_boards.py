import logging
import math
import threading
import warnings
from pathlib import Path

import pytest

from lmscale.train.callbacks import TensorBoard


def line(step: int, loss: float) -> dict:
    return {
        "step": step,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": None,
        "tokens_per_s": 5.0,
        "mfu": None,
    }


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard itself shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard and protobuf, when they are imported
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder), {"scalars": 0})
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])


def test_steps_and_evaluations_become_scalars(tmp_path: Path) -> None:
    with TensorBoard(tmp_path, from_step=0) as board:
        for step in (1, 2, 3):
            board.step(line(step, loss=4.0 / step))
        board.evaluation({"step": 3, "corpus": "/data/held", "metric": "loss", "value": 2.0})
        board.evaluation({"step": 3, "corpus": "other", "metric": "loss", "value": math.nan})
    assert curve(tmp_path, "train/loss") == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3))]
    assert curve(tmp_path, "eval/loss/data/held") == [(3, 2.0)]
    assert tags(tmp_path) == {"train/loss", "train/lr", "speed/tokens_per_s", "eval/loss/data/held"}


def test_a_resumed_curve_has_no_zigzag(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, from_step=0)
    for step in range(1, 11):
        first.step(line(step, loss=1.0))
    first.flush()  # and dies: the checkpoint is of step 6
    with TensorBoard(tmp_path, from_step=6) as second:
        for step in range(7, 13):
            second.step(line(step, loss=2.0))
    first.close()
    found = curve(tmp_path, "train/loss")
    assert [step for step, _ in found] == list(range(1, 13))
    assert [loss for _, loss in found] == [1.0] * 6 + [2.0] * 6


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING), TensorBoard(tmp_path / "tensorboard", from_step=0) as b:
        b.step(line(1, loss=1.0))
        b.evaluation({"step": 1, "corpus": "held", "metric": "loss", "value": 2.0})
        b.flush()
    assert len(caplog.records) == 1 and "tensorboard" in caplog.text


# TensorBoard's thread hands its error to the next call, and ends with it: Python prints that too
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board = TensorBoard(tmp_path, from_step=0)
    (events,) = tmp_path.iterdir()
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    # By renaming: the writer's thread opens the name anew when it likes, also between an unlink and a symlink.
    full.replace(events)  # every write of the writer's thread fails from here on
    for step in range(1, 2000):
        board.step(line(step, loss=1.0))
        board.flush()
    board.close()
    for thread in threading.enumerate():
        if type(thread).__name__ == "_AsyncWriterThread":
            thread.join(10)
    assert (
        len([record for record in caplog.records if record.name == "lmscale.train.callbacks"]) == 1
    )
