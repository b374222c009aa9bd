"""One budget of restarts, whoever makes them; and who is told when it is spent."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmscale.run_folder.events import EventLog
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.supervisor.rank_process import NodeTopology
from tests.support.stand_ins import Nodes, Start, watched


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    yield from watched(tmp_path)


def earlier_starts(start: Start, *names: str, saved: int | None = None) -> None:
    """Starts that ended without a word, as with their node; `saved` by the first of them."""
    for name in names:
        log = EventLog(RunFolder(start.run), name)
        log.write("start", by_hand=False, ranks=2)
        if saved is not None and name == names[0]:
            log.write("save", step=saved)
        log.close()
        os.utime(log.path, (0, 0))  # long ago: this process is no supervisor


def test_a_spent_budget_is_written_down_so_that_no_scheduler_starts_again(start: Start) -> None:
    stop = RunFolder(start.run).stop
    code, said = start.to_the_end("sys.exit(75)", by_hand=False, start="job-1", max_restarts=1)
    assert code == 75, said
    assert start.kinds() == ["start", "restart", "start", "exit"]
    assert "1 restarts since the newest checkpoint, cluster.max_restarts=1" in stop.read_text()
    assert "lmscale resume" in said
    code, said = start.to_the_end("mark('ran', 1)", by_hand=False, start="job-1-1")
    assert code == 0 and not start.marks("ran")
    assert "stopped by retry, 75; not started again: 1 restarts" in said


def test_by_hand_a_spent_budget_stands_in_nobodys_way(start: Start) -> None:
    code, _ = start.to_the_end("sys.exit(75)", max_restarts=1)
    assert code == 75
    assert not RunFolder(start.run).stop.exists()


@pytest.mark.parametrize(
    ("before", "saved", "allowed", "runs"),
    [
        (["a", "b", "c"], None, 2, False),  # this is restart 3
        (["a", "b", "c"], None, 3, True),
        (["a", "b", "c"], 7, 2, False),  # the first of them saved; nothing since
        (["a"], None, 0, True),  # the scheduler has decided to try once more
        (["a", "b"], None, 0, False),
        ([], None, 0, True),
    ],
)
def test_starts_that_died_without_a_word_count_too(
    start: Start, before: list[str], saved: int | None, allowed: int, runs: bool
) -> None:
    earlier_starts(start, *before, saved=saved)
    code, said = start.to_the_end(
        "mark('ran', 1)", by_hand=False, start="job-2", max_restarts=allowed
    )
    assert bool(start.marks("ran")) == runs, said
    assert code == (0 if runs else 75)
    assert RunFolder(start.run).stop.exists() != runs
    if not runs:
        assert (
            start.events()[-1]["kind"] == "exit" and "not started" in start.events()[-1]["reason"]
        )
        assert f"cluster.max_restarts={allowed}" in RunFolder(start.run).stop.read_text()


@pytest.mark.parametrize("who", [{"by_hand": True}, {"by_hand": False, "fresh": True}])
def test_what_a_person_asks_for_counts_anew(start: Start, who: dict[str, bool]) -> None:
    earlier_starts(start, "a", "b", "c", "d")
    code, said = start.to_the_end("sys.exit(75)", start="new", max_restarts=1, **who)
    assert code == 75, said
    names = [event["start"] for event in start.events() if event["kind"] == "start"]
    assert names == ["a", "b", "c", "d", "new", "new.1"]
    begun = [event for event in start.events() if event["kind"] == "start"][-2:]
    assert [event["fresh"] for event in begun] == [who.get("fresh", False), False]


def test_a_spent_budget_is_told_to_all_nodes(start: Start) -> None:
    earlier_starts(start, "a", "b", "c", "d")
    codes, said = Nodes(start, "mark('ran', 1)", max_restarts=2).launch().end()
    assert codes == [75, 75], said
    assert not start.marks("ran") and "cluster.max_restarts=2" in said[0]


def test_a_child_that_is_no_rank_gets_the_name_of_the_start_and_nothing_else() -> None:
    env = {"PATH": "/bin", "OMP_NUM_THREADS": "3"}
    place = NodeTopology(1, ranked=False)
    assert place.environment(env, rank=0, port=5, start="s") == {**env, "LMSCALE_START": "s"}


def test_a_child_that_is_no_rank_is_started_again_like_one(start: Start) -> None:
    body = """
    mark(os.environ["LMSCALE_START"], json.dumps(sorted(os.environ)))
    sys.exit(75 if os.environ["LMSCALE_START"] == "s" else 0)
    """
    code, said = start.to_the_end(body, ranks=1, nodes={"ranked": False}, max_restarts=1)
    assert code == 0, said
    names = json.loads(start.marks("s.1")[0])
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "LMSCALE_PULSE_FD"} & set(names)


def test_a_deadline_asks_the_ranks_of_one_node_to_save(start: Start) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))\nmark('ready', 1)\nwait()"
    code, said = start.to_the_end(body, deadline=time.time() + 1.5, max_restarts=3)
    assert code == 85 and "nearly over" in said
