"""What a run folder says, read cheaply, and one question for many jobs."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from lmscale.base.errors import RetryableError
from lmscale.base.records import ends_of, newest_lines
from lmscale.run_folder.attempts import claim, mark_finished, settle
from lmscale.run_folder.events import EventLog, events_path
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.base import JobState
from lmscale_launcher.clusters.job import JobRecord
from lmscale_launcher.jobs.answers import ClusterAnswers
from lmscale_launcher.jobs.job_plan import write_record
from lmscale_launcher.jobs.run_facts import RunFacts, RunFolderReader, run_folders
from lmscale_launcher.jobs.run_state import State, judge
from lmscale_launcher.jobs.status import as_object

RECORD = JobRecord(1, "slurm", "17", "login", 1.0, 2, 1, 4)


def started(path: Path, start: str = "s-1", **fields: Any) -> RunFolder:
    folder = RunFolder(path)
    log = EventLog(folder, start)
    log.write("start", by_hand=True, ranks=2, **fields)
    log.write("attempt", attempt=1, from_step=0, total_steps=50)
    log.close()
    return folder


def write_lines(path: Path, count: int) -> None:
    with path.open("w") as file:
        for n in range(1, count + 1):
            file.write(
                json.dumps({"step": n, "loss": 1 / n, "tokens": n, "tokens_per_s": 9}) + "\n"
            )


def checkpoint(folder: RunFolder, step: int, attempt: int) -> None:
    path = folder.checkpoint(step, attempt)
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


@pytest.mark.parametrize("count", [0, 1, 2, 50, 5000])
@pytest.mark.parametrize("torn", [b"", b'{"step": 9', b"\n", b'"text"\n'])
def test_newest_lines_are_those_of_the_whole_file(tmp_path: Path, count: int, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, count)
    with path.open("ab") as file:
        file.write(torn)
    spoiled = torn.endswith(b"\n")  # a line, though none that can be read
    want = [line["step"] for line in newest_lines(path, 10**6)]
    assert want == list(range(1, count + 1))
    found = [line["step"] for line in newest_lines(path, 7)]
    assert found == want[-(7 - spoiled) :]
    assert newest_lines(tmp_path / "none", 3) == []


def test_a_long_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 34)  # a hole: reading it would take long
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(b'{"step": %d}\n' % n for n in range(300)))
    begun = time.process_time()
    assert [line["step"] for line in newest_lines(path, 3)] == [297, 298, 299]
    assert [line["step"] for line in ends_of(path, head_bytes=99, tail_bytes=50)][-1] == 299
    assert time.process_time() - begun < 1


def test_a_folder_in_facts(tmp_path: Path) -> None:
    folder = started(tmp_path / "r")
    number = claim(folder, {})
    settle(folder, number, 0)
    write_lines(folder.metrics, 20)
    checkpoint(folder, 10, 1)
    checkpoint(folder, 20, 1)
    settle(folder, claim(folder, {}), 10)  # fences the orphan's step 20
    write_record(folder, RECORD)
    facts = RunFolderReader().read(folder)
    assert facts.saved is not None and facts.saved.step == 10
    assert facts.lines[-1]["step"] == 20
    assert (facts.attempt, facts.finished, facts.stop) == (2, None, None)
    assert facts.alive is True  # this process wrote its events
    assert facts.record == RECORD
    assert facts.planned_steps == 50
    mark_finished(folder, 2, 20)
    folder.stop.write_text("gave up: 3 restarts\n")
    facts = RunFolderReader().read(folder)
    assert (facts.finished, facts.stop) == (20, "gave up: 3 restarts")


def test_a_dead_process_is_seen_as_dead(tmp_path: Path) -> None:
    folder = started(tmp_path / "r")
    path = events_path(folder, "s-1")
    path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194303'))
    assert RunFolderReader().read(folder).alive is False
    assert judge(RunFolderReader().read(folder), None, now=time.time()).state == "lost"


def test_the_newest_start_is_the_one_that_began_last(tmp_path: Path) -> None:
    folder = started(tmp_path / "r", "zzz")
    time.sleep(0.01)
    started(tmp_path / "r", "aaa")
    os.utime(events_path(folder, "zzz"))  # an orphan that still beats
    facts = RunFolderReader().read(folder)
    assert [event["start"] for event in facts.starts] == ["zzz", "aaa"]
    assert facts.events[0]["start"] == "aaa"


def test_an_unchanged_folder_is_read_once_and_a_changed_one_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reads = started(tmp_path / "r"), []
    monkeypatch.setattr(
        "lmscale_launcher.jobs.run_facts.newest_lines", lambda path, n: reads.append(path) or []
    )
    reader = RunFolderReader()
    reader.read(folder)
    reader.read(folder)
    assert len(reads) == 1
    for change in (
        lambda: write_lines(folder.metrics, 1),
        lambda: checkpoint(folder, 3, 1),
        folder.stop.touch,
        lambda: write_record(folder, RECORD),
        lambda: claim(folder, {}),
        lambda: started(folder.path, "s-2"),
    ):
        before = len(reads)
        change()
        reader.read(folder)
        assert len(reads) == before + 1


def test_what_cannot_be_read_is_said_and_not_raised(tmp_path: Path) -> None:
    folder = started(tmp_path / "r")
    folder.jobs.mkdir()
    (folder.jobs / "1.json").write_text("{")
    one = judge(RunFolderReader().read(folder), None, now=time.time())
    assert one.state == "unknown"
    assert "1.json" in one.reason


def test_steps_are_planned_by_the_run_file_until_a_start_has_counted(tmp_path: Path) -> None:
    run = (
        "model: {num_layers: 1, hidden_size: 16, num_heads: 1}\ndata: {corpora: [{path: /none}]}\n"
        "optim: {lr: 1e-3}\n"
    )
    folder = RunFolder(tmp_path / "r")
    folder.jobs.mkdir(parents=True)
    train = "train: {global_batch_size: 2, micro_batch_size: 1, seq_len: 16, "
    (folder.jobs / "1.yaml").write_text(run + train + "tokens: 320}\n")
    write_record(folder, RECORD)
    assert RunFolderReader().read(folder).planned_steps == 10
    (folder.jobs / "1.yaml").write_text(run + train + "epochs: 1}\n")  # its corpus is not there
    assert RunFolderReader().read(folder).planned_steps is None


def test_runs_are_found_in_folders_of_folders(tmp_path: Path) -> None:
    for name in ("b", "a", "sweep/x", "sweep/y", ".hidden", "deep/er/z"):
        started(tmp_path / name)
    (tmp_path / "a" / "checkpoints" / "inner" / "events").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [str(one.path.relative_to(tmp_path)) for one in run_folders(tmp_path, depth=3)]
    assert found == ["a", "b", "deep/er/z", "sweep/x", "sweep/y"]
    assert list(run_folders(tmp_path / "none")) == []


class Controller:
    """A cluster that answers, or does not."""

    poll_interval_s = 30.0

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.fails = False

    def states(self, jobs: Any) -> list[JobState]:
        self.asked.append([record.job for _, record in jobs])
        if self.fails:
            raise RetryableError("squeue: timed out after 10 s")
        return [JobState("running", raw=record.job) for _, record in jobs]


def facts_of(*numbers: int, **changes: Any) -> list[RunFacts]:
    return [
        RunFacts(RunFolder(Path(f"/r{n}")), record=JobRecord(1, "slurm", str(n), "h", 1.0, 1, 1, 1), **changes)
        for n in numbers
    ]  # fmt: skip


def test_one_question_for_all_jobs_and_not_too_often() -> None:
    controller, now = Controller(), [0.0]
    answers = ClusterAnswers(clusters=lambda kind: controller, clock=lambda: now[0])  # type: ignore[arg-type,return-value]
    by_hand = RunFacts(RunFolder(Path("/hand")))
    found = [*facts_of(1, 2), by_hand, *facts_of(3)]
    assert [one and one.raw for one in answers.of(found)] == ["1", "2", None, "3"]
    now[0] = 29.0
    told = answers.of([*found, *facts_of(4)])
    assert [one and one.standing for one in told] == [
        "running",
        "running",
        None,
        "running",
        "unknown",
    ]
    assert controller.asked == [["1", "2", "3"]]
    now[0] = 31.0
    assert answers.of(facts_of(4))[0].raw == "4"  # type: ignore[union-attr]
    assert len(controller.asked) == 2


def test_a_run_that_has_ended_for_good_is_not_asked_about() -> None:
    controller = Controller()
    event = {"time": 2.0, "start": "slurm-1-0", "host": "n1", "pid": 1}
    events = ({**event, "kind": "start"}, {**event, "kind": "exit", "code": 65})
    answers = ClusterAnswers(clusters=lambda kind: controller)  # type: ignore[arg-type,return-value]
    assert answers.of(facts_of(1, events=events)) == [None]
    again = ({**event, "kind": "start"}, {**event, "kind": "exit", "code": 75})
    assert answers.of(facts_of(1, events=again)) != [None]
    assert controller.asked == [["1"]]


def test_a_cluster_that_does_not_answer_says_so() -> None:
    controller = Controller()
    controller.fails = True
    answers = ClusterAnswers(clusters=lambda kind: controller)  # type: ignore[arg-type,return-value]
    (told,) = answers.of(facts_of(1))
    assert told == JobState("unknown", "slurm did not answer: squeue: timed out after 10 s")


def test_two_hundred_runs_are_shown_without_importing_torch(tmp_path: Path) -> None:
    for n in range(200):
        folder = started(tmp_path / "runs" / f"r{n}")
        for start in range(5):
            started(folder.path, f"s-{start}")
        folder.attempts.mkdir()
        for k in range(1, 6):
            attempt = {"attempt": k, "from": 0, "source": None, "finished": None, "placement": {}}
            (folder.attempts / f"{k}.json").write_text(json.dumps(attempt) + "\n")
        write_lines(folder.metrics, 300)
        checkpoint(folder, 100, 5)
        checkpoint(folder, 200, 5)
    code = (
        "import sys; from lmscale_launcher.jobs.status import status\n"
        "status(None, watch=False, as_json=True); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, timeout=60, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert len(told) == 200
    assert {(one["state"], one["step"], one["checkpoint_step"]) for one in told} == {
        ("running", 300, 200)
    }


def test_every_key_and_state_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "status.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    one = judge(RunFacts(RunFolder(Path("/r"))), None, now=0.0)
    assert named == {*as_object(one), *get_args(State)}
