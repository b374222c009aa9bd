"""The fence: whatever orphans do, and whenever, at most one line of history is valid."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.errors import CheckpointError, Overtaken, RetryableError
from lmscale.run_folder import attempts as module
from lmscale.run_folder.attempts import (
    AttemptRecord,
    Fence,
    check_not_overtaken,
    claim,
    fence,
    finished_at,
    mark_finished,
    newest,
    read_attempt,
    settle,
)
from lmscale.run_folder.checkpoints import (
    CheckpointEntry,
    listing,
    newest_valid,
    reason_to_reload,
    write_manifest,
)
from lmscale.run_folder.paths import RunFolder

Key = tuple[int, int]  # (step, attempt)


def publish(folder: RunFolder, step: int, attempt: int) -> Path:
    path = folder.checkpoint(step, attempt)
    path.mkdir(parents=True)
    write_manifest(path, {"format": 1, "step": step, "attempt": attempt, "files": {}})
    return path


class History:
    """Processes that claim, load, settle, publish and delete, each able to stall at any point."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.lineage: dict[Key, tuple[Key, ...]] = {}  # every checkpoint ever published, and before
        self.confirmed: list[int] = []  # attempts that train
        self.late: set[Key] = set()  # published although a newer attempt already trained

    def process(self, stride: int) -> Iterator[None]:
        """One attempt; every yield is a point where it may stall for any time, or die."""
        try:
            yield from self._attempt(stride)
        except Overtaken:
            return

    def _attempt(self, stride: int) -> Iterator[None]:
        k = claim(self.folder, {"world": 1})
        yield
        for _ in range(3):
            found = newest_valid(self.folder)
            yield
            loaded = found.path if found else None
            settle(self.folder, k, found.step if found else 0)
            yield
            if not reason_to_reload(self.folder, k, loaded=loaded):
                break
            yield
            settle(self.folder, k, None)
            yield
        else:
            return
        self.confirmed.append(k)
        yield from self._train(k, found, stride)

    def _train(self, k: int, found: CheckpointEntry | None, stride: int) -> Iterator[None]:
        step = found.step if found else 0
        before: tuple[Key, ...] = ()
        if found:
            before = (*self.lineage[found.step, found.attempt], (found.step, found.attempt))
        while True:
            step += stride
            yield
            check_not_overtaken(self.folder, k)
            yield  # the window: checked, not yet renamed
            publish(self.folder, step, k)
            self.lineage[step, k] = before
            if any(newer > k for newer in self.confirmed):
                self.late.add((step, k))
            before = (*before, (step, k))
            yield
            doomed = [one.path for one in listing(self.folder) if one.valid][2:]
            check_not_overtaken(self.folder, k)
            yield
            for path in doomed:
                shutil.rmtree(path, ignore_errors=True)

    def check(self) -> None:
        valid = [(one.step, one.attempt) for one in listing(self.folder) if one.valid]
        for newer, older in pairwise(valid):
            assert older in self.lineage[newer], f"{older} and {newer} are two lines of history"
        assert not self.late & set(valid), "an orphan's late checkpoint counts"


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # thousands of steps on a real disk


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def play(history: History, moves: list[tuple[int, int]]) -> None:
    processes: list[Iterator[None]] = []
    for who, actions in moves:
        if who >= len(processes):
            processes.append(history.process(stride=1 + len(processes) % 3))
        for _ in range(actions):
            next(processes[min(who, len(processes) - 1)], None)
            history.check()


MOVES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=6, max_size=30)


@settings(max_examples=80, deadline=None)
@given(MOVES)
def test_at_most_one_line_of_history_is_valid(moves: list[tuple[int, int]]) -> None:
    with _folder() as path:
        play(History(RunFolder(Path(path))), moves)


# AttemptRecord 1 stalls between its check and its rename; attempt 2 goes on; then attempt 1 wakes up.
STALLED = [(0, 9), (1, 6), (0, 1), (1, 3)]


def test_an_orphan_that_wakes_in_its_window_publishes_in_vain(tmp_path: Path) -> None:
    history = History(RunFolder(tmp_path))
    play(history, STALLED)
    assert history.late == {(2, 1)}
    assert history.confirmed == [1, 2]


def test_without_the_fence_that_history_has_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fence, "fenced_by", lambda *_, **__: None)
    with pytest.raises(AssertionError, match=r"two lines|late checkpoint"):
        play(History(RunFolder(tmp_path)), STALLED)


@given(
    st.dictionaries(st.integers(1, 9), st.none() | st.integers(0, 20)),
    st.integers(0, 20),
    st.integers(1, 9),
)
def test_valid_is_the_rule_as_written(
    froms: dict[int, int | None], step: int, attempt: int
) -> None:
    rule = Fence({k: AttemptRecord(k, from_step) for k, from_step in froms.items()})
    newer = [s for k, s in froms.items() if k > attempt and s is not None]
    assert rule.valid(step, attempt) == all(step <= s for s in newer)


def test_the_window_between_check_and_rename_is_harmless(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    settle(folder, claim(folder, {}), 0)
    publish(folder, 10, 1)
    check_not_overtaken(folder, 1)  # the orphan has checked; now it stalls
    settle(folder, claim(folder, {}), 10)
    assert not reason_to_reload(folder, 2, loaded=folder.checkpoint(10, 1))
    publish(folder, 20, 1)  # and renames at last
    found = newest_valid(folder)
    assert found is not None and (found.step, found.attempt) == (10, 1)
    late = listing(folder)[0]
    assert (late.step, late.reason) == (20, "overtaken: attempt 2 resumed from step 10")


def test_a_checkpoint_published_while_loading_is_taken_not_lost(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    settle(folder, claim(folder, {}), 0)
    publish(folder, 10, 1)
    k = claim(folder, {})
    publish(folder, 20, 1)  # after attempt 2 has listed step 10, before it settles
    settle(folder, k, 10)
    assert "step-00000020-a1" in reason_to_reload(folder, k, loaded=folder.checkpoint(10, 1))
    settle(folder, k, None)
    found = newest_valid(folder)
    assert found is not None and found.step == 20
    assert not reason_to_reload(
        folder, k, loaded=folder.checkpoint(10, 1), damaged=[folder.checkpoint(20, 1)]
    )


def test_a_loaded_checkpoint_that_is_gone_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    settle(folder, claim(folder, {}), 0)
    path = publish(folder, 10, 1)
    settle(folder, claim(folder, {}), 10)
    shutil.rmtree(path)
    assert reason_to_reload(folder, 2, loaded=path) == "step-00000010-a1 is gone"


def test_a_claim_overtakes_but_fences_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert newest(folder) == 0
    settle(folder, claim(folder, {}), 0)
    publish(folder, 10, 1)
    assert claim(folder, {"world": 2}) == 2
    assert fence(folder).valid(10, 1) and fence(folder).valid(10_000, 1)
    assert read_attempt(folder, 2).placement == {"world": 2}
    with pytest.raises(Overtaken, match="attempt 2 has taken over"):
        check_not_overtaken(folder, 1)
    with pytest.raises(Overtaken):
        settle(folder, 1, 10)
    settle(folder, 1, None)  # taking back is always allowed
    check_not_overtaken(folder, 2)


def test_claimants_that_race_get_different_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    claim(folder, {})
    seen = iter([0, 0, 1])  # both listed before anyone created
    monkeypatch.setattr(module, "newest", lambda _: next(seen))
    assert claim(folder, {}) == 2


@pytest.mark.parametrize("torn", [b"", b'{"attempt": 2, "fr', b"\0" * 40])
def test_a_claim_torn_by_a_crash_counts_as_unsettled(tmp_path: Path, torn: bytes) -> None:
    folder = RunFolder(tmp_path)
    settle(folder, claim(folder, {}), 0)
    (folder.attempts / "2.json").write_bytes(torn)
    assert read_attempt(folder, 2) == AttemptRecord(2)
    assert claim(folder, {}) == 3


def test_a_damaged_attempt_is_an_error_not_a_guess(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    settle(folder, claim(folder, {}), 0)
    (folder.attempts / "1.json").write_text(
        '{"attempt": 1, "from": "O", "source": null, "finished": null, "placement": {}}\n'
    )
    with pytest.raises(CheckpointError, match=r"1\.json: from: .* the file is damaged"):
        fence(folder)


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b"[" * 100_000 + b"}", b"\xff}", b'{"attempt": ' + b"9" * 5000 + b"}",
        b'{"attempt": 1, "from": NaN, "source": null, "finished": null, "placement": {}}',
        b'{"attempt": 1, "from": true, "source": null, "finished": null, "placement": {}}',
        b'{"attempt": 1, "from": -1, "source": null, "finished": null, "placement": {}}',
        b'{"attempt": 2, "from": 1, "source": null, "finished": null, "placement": {}}',
        b'{"attempt": 1, "from": 1, "source": null, "finished": null, "placement": []}',
        b'{"attempt": 1, "from": 1, "from": 2, "source": null, "finished": null, "placement": {}}',
    ],
)  # fmt: skip
def test_any_other_attempt_is_the_same_error(tmp_path: Path, body: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.attempts.mkdir()
    (folder.attempts / "1.json").write_bytes(body + b"\n")
    with pytest.raises(CheckpointError, match=r"1\.json: .* restore it"):
        fence(folder)
    (folder.attempts / "1.json").unlink()
    os.mkfifo(folder.attempts / "1.json")
    with pytest.raises(CheckpointError, match=r"1\.json is a FIFO"):
        fence(folder)


def test_an_unreadable_attempts_folder_does_not_look_like_a_fresh_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.attempts.symlink_to(folder.attempts)  # ELOOP
    with pytest.raises(RetryableError, match="listing"):
        newest(folder)


def test_settling_is_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    k = claim(folder, {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RetryableError, match="free some space"):
        settle(folder, k, 7)
    assert json.loads((folder.attempts / "1.json").read_text())["from"] is None
    assert [p.name for p in folder.attempts.iterdir()] == ["1.json"]


def test_finished_holds_until_a_newer_attempt(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert finished_at(folder) is None
    settle(folder, claim(folder, {"world": 4}), 0)
    mark_finished(folder, 1, 40)
    assert finished_at(folder) == 40
    assert read_attempt(folder, 1) == AttemptRecord(1, 0, None, 40, {"world": 4})
    claim(folder, {})
    assert finished_at(folder) is None


def test_a_run_that_lost_its_checkpoints_does_not_start_from_zero(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    settle(folder, claim(folder, {}), 0)
    assert newest_valid(folder) is None
    settle(folder, claim(folder, {}), 10)
    with pytest.raises(CheckpointError, match="resumed from step 10 before"):
        newest_valid(folder)


def test_a_step_of_another_run_does_not_count_as_reached(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    settle(folder, claim(folder, {}), 10, source="/elsewhere/step-00000010-a1")
    assert newest_valid(folder) is None
