"""How jobs stand, by recorded answers of squeue, sacct and scontrol; see golden/slurm-answers/README.md."""

import json
from pathlib import Path

import pytest

from lmscale_launcher.clusters.base import JobState
from lmscale_launcher.slurm import query as answers
from lmscale_launcher.slurm.query import QueueEntry, Unreadable
from lmscale_launcher.slurm.states import by_job, find, of_chain, state_of

GOLDEN = Path(__file__).parents[2] / "golden/slurm-answers"


def sample(name: str) -> str:
    return (GOLDEN / name).read_text()


def state(found: list[QueueEntry], job: str, name: str = "") -> JobState:
    found_state = find(job, by_job(found), name=name)
    assert found_state is not None, f"job {job} is not there"
    return found_state


JSON = ["squeue-22.05.json", "squeue-23.02.json", "squeue-23.11.json", "squeue-24.05.json"]


@pytest.fixture(params=JSON)
def jobs(request: pytest.FixtureRequest) -> list[QueueEntry]:
    return answers.read_squeue_json(sample(request.param))


def test_a_running_job_in_the_json_of_every_version(jobs: list[QueueEntry]) -> None:
    assert state(jobs, "5") == JobState("running", "", ("n1", "n2"), None, 0, "RUNNING")


def test_jobs_that_have_ended_are_still_listed(jobs: list[QueueEntry]) -> None:
    assert state(jobs, "6") == JobState("ended", "", (), 0, 0, "COMPLETED")
    assert state(jobs, "7") == JobState("ended", "failed", (), 75, 0, "FAILED")
    assert state(jobs, "9") == JobState("ended", "cancelled", (), 128 + 15, 0, "CANCELLED")


def test_a_requeued_job_waits_and_has_its_restarts(jobs: list[QueueEntry]) -> None:
    words = "requeued, a short pause before it starts again"
    assert state(jobs, "10") == JobState("pending", words, (), None, 1, "PENDING (BeginTime)")


def test_why_a_job_waits(jobs: list[QueueEntry]) -> None:
    assert state(jobs, "15").reason == "more nodes than the partition has or allows"
    assert state(jobs, "16").reason == "held by its owner: scontrol release JOB"
    assert state(jobs, "14").reason.startswith("it waits for free nodes: Nodes required")


def test_tasks_of_an_array_have_its_id(jobs: list[QueueEntry]) -> None:
    assert state(jobs, "12_1").standing == "running"
    assert state(jobs, "12_3").standing == "pending"
    assert find("12_6", by_job(jobs)) is None
    assert state(jobs, "12").standing == "running"
    assert find("19", by_job(jobs)) is None  # its raw id: 12_1 is what squeue calls it


def test_a_node_that_could_not_open_the_log() -> None:
    jobs = answers.read_squeue_json(sample("squeue-22.05.json"))
    seen = state(jobs, "8")
    assert (seen.standing, seen.code) == ("ended", None)  # 0:53 is no code of the script's
    assert "log folder" in seen.reason


@pytest.mark.parametrize("name", JSON[1:])
def test_a_job_that_is_completing_has_not_ended(name: str) -> None:
    seen = state(answers.read_squeue_json(sample(name)), "20")
    assert (seen.standing, seen.raw) == ("running", "COMPLETING")


@pytest.mark.parametrize("name", JSON[1:])
def test_parts_of_a_heterogeneous_job(name: str) -> None:
    jobs = answers.read_squeue_json(sample(name))
    assert state(jobs, "30+1").standing == state(jobs, "30").standing == "running"


def test_states_that_23_11_lists() -> None:
    jobs = answers.read_squeue_json(sample("squeue-23.11.json"))
    assert state(jobs, "21").reason == "its nodes are booting"
    assert state(jobs, "21").standing == "pending"
    assert state(jobs, "22").standing == "pending"
    assert "scontrol release" in state(jobs, "22").reason
    assert state(jobs, "23").code == 128 + 9
    assert state(jobs, "24") == JobState("ended", "a node failed", (), None, 0, "NODE_FAIL")


def test_a_state_of_a_later_version_is_unknown_and_not_ended() -> None:
    jobs = answers.read_squeue_json(sample("squeue-24.05.json"))
    assert state(jobs, "26").standing == "unknown"
    assert "TELEPORTING" in state(jobs, "26").reason
    assert state(jobs, "25").reason == "out of memory on a node"


def test_an_answer_without_a_controller_is_no_answer() -> None:
    with pytest.raises(Unreadable, match="Failed while looking for jobs"):
        answers.read_squeue_json(sample("squeue-22.05-no-controller.json"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"jobs": 3}',
        '{"jobs": [{"job_id": 1, "job_state": []}]}',
        '{"jobs": [{"job_id": 1}]}',
        "squeue: no",
    ],
)
def test_another_shape_is_no_answer(text: str) -> None:
    with pytest.raises(Unreadable):
        answers.read_squeue_json(text)


def test_errors_beside_jobs_are_not_fatal() -> None:
    body = json.loads(sample("squeue-23.11.json"))
    body["errors"] = [{"description": "one job could not be shown"}]
    assert state(answers.read_squeue_json(json.dumps(body)), "5").standing == "running"


def test_squeue_without_json_tells_the_same() -> None:
    text = answers.read_squeue(sample("squeue-22.05.txt"))
    jobs = answers.read_squeue_json(sample("squeue-22.05.json"))
    for job in (5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17):
        mine, theirs = state(text, str(job)), state(jobs, str(job))
        assert (mine.standing, mine.hosts) == (theirs.standing, theirs.hosts), job
    assert state(text, "12_4").standing == "pending"
    assert state(text, "12_1").standing == "running"


def test_lines_that_are_no_jobs_are_no_answer() -> None:
    with pytest.raises(Unreadable):
        answers.read_squeue("slurm_load_jobs error: Unable to contact slurm controller\n")
    with pytest.raises(Unreadable):
        answers.read_sacct("sacct: error: Problem talking to the database\n")


def test_sacct_tells_the_newest_incarnation_and_counts_them() -> None:
    jobs = answers.read_sacct(sample("sacct-22.05.txt"))
    assert state(jobs, "10") == JobState("running", "", ("n1",), None, 1, "RUNNING")
    assert state(jobs, "11").standing == "pending"  # its first incarnation ended with NODE_FAIL
    assert state(jobs, "7") == JobState("ended", "failed", (), 75, 0, "FAILED")
    assert state(jobs, "8").code is None
    assert state(jobs, "9") == JobState("ended", "cancelled by root", (), None, 0, "CANCELLED")


def test_a_job_that_lost_its_node_and_never_came_back_has_ended() -> None:
    seen = state(answers.read_sacct("11|NODE_FAIL|0:0|2026-11-24T16:07:50|n4|r\n"), "11")
    assert (seen.standing, seen.reason, seen.code) == ("ended", "a node failed", None)


def test_scontrol_tells_the_same() -> None:
    text = answers.read_scontrol(sample("scontrol-22.05.txt"))
    jobs = answers.read_squeue_json(sample("squeue-22.05.json"))
    for job in ("5", "6", "7", "9", "10", "16", "12_1", "12_4"):
        mine, theirs = state(text, job), state(jobs, job)
        assert (mine.standing, mine.hosts, mine.code, mine.restarts) == (
            theirs.standing, theirs.hosts, theirs.code, theirs.restarts,
        ), job  # fmt: skip


def test_another_job_with_the_same_number_is_not_ours() -> None:
    jobs = answers.read_squeue_json(sample("squeue-22.05.json"))
    assert find("5", by_job(jobs), name="my run") is None
    assert state(jobs, "5", name="train").standing == "running"


def test_a_node_list_that_cannot_be_read_is_shown_as_it_is() -> None:
    assert state_of(QueueEntry("1", ("RUNNING",), nodes="n[1-")).hosts == ("n[1-",)


def test_a_chain_stands_as_the_job_at_work_else_the_next_else_the_last() -> None:
    ended, running = JobState("ended", code=0), JobState("running")
    pending, unknown = JobState("pending"), JobState("unknown")
    assert of_chain([ended, running, pending]) is running
    assert of_chain([unknown, pending]) is pending
    assert of_chain([ended, unknown]) is unknown
    assert of_chain([unknown, ended]) is ended


@pytest.mark.parametrize(
    ("restarts", "words"),
    [
        (0, "its begin time is not reached"),
        (1, "requeued, a short pause before it starts again"),
        (
            None,
            "its begin time is not reached (after a requeue: a short pause)",
        ),  # squeue without --json
    ],
)
def test_only_a_requeued_job_is_said_to_pause(restarts: int | None, words: str) -> None:
    assert state_of(QueueEntry("1", ("PENDING",), "BeginTime", restarts=restarts)).reason == words
