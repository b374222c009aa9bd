"""How a run stands: folder and cluster against each other, as one pure function."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.run_folder.paths import RunFolder
from lmscale.run_folder.status_file import StatusRecord
from lmscale_launcher.clusters.base import JobState
from lmscale_launcher.clusters.job import JobRecord
from lmscale_launcher.jobs.job_plan import write_record
from lmscale_launcher.jobs.run_facts import JobEnd, RunFacts, RunFolderReader, SavedCheckpoint
from lmscale_launcher.jobs.run_state import RunStatus, judge
from lmscale_launcher.jobs.status import as_object

NOW = 1_000_000.0
FOLDER = RunFolder(Path("/runs/big"))


def record(**changes: Any) -> JobRecord:
    facts = {
        "number": 1, "kind": "slurm", "job": "17", "host": "login", "time": NOW - 500, "nodes": 4,
        "min_nodes": 2, "ranks_per_node": 8,
    }  # fmt: skip
    return JobRecord(**{**facts, **changes})


def event(kind: str, *, at: float = -100, pid: int = 1, **fields: Any) -> dict[str, Any]:
    origin = {"start": "slurm-17-0", "host": "n1/4026", "pid": pid}
    return {"time": NOW + at, "kind": kind, **origin, **fields}


def steps(first: int, last: int) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"step": n, "loss": 3.0, "tokens": 1000 * n, "tokens_per_s": 500.0}
        for n in range(first, last + 1)
    )


def begun(
    *more: dict[str, Any], by_hand: bool = False, from_step: int | None = 0
) -> dict[str, Any]:
    """Facts of a start of job 17 that has come to life."""
    events = [event("start", by_hand=by_hand, ranks=2), event("start", pid=2, by_hand=False)]
    if from_step is not None:
        events.append(event("attempt", pid=2, attempt=1, from_step=from_step, total_steps=100))
    events += more
    return {
        "starts": (events[0],), "events": tuple(events), "beat_time": NOW - 3, "attempt": 1,
        "lines": steps(21, 40), "lines_time": NOW - 2, "planned_steps": 100,
    }  # fmt: skip


def standing(facts: dict[str, Any], answer: JobState | None = None) -> RunStatus:
    return judge(RunFacts(FOLDER, **facts), answer, now=NOW)


RUNNING = JobState("running", hosts=("n1", "n2"))
UNKNOWN = JobState("unknown", "slurm did not answer: timed out")


@pytest.mark.parametrize(
    ("facts", "answer", "words"),
    [
        # the cluster's queue
        ({"record": record()}, JobState("pending", "more nodes than the partition has"),
         "pending: more nodes than the partition has"),
        ({**begun(event("exit", code=75, reason="retry, 75")), "record": record()},
         JobState("pending", "node n2 is down"), "waiting to start again: node n2 is down"),
        ({**begun(event("exit", code=137, reason="died by SIGKILL, 137")), "record": record()},
         JobState("pending"), "waiting to start again: died by SIGKILL, 137"),
        # a job that was submitted after an older start has ended is pending, not waiting
        ({**begun(), "record": record(job="18", time=NOW - 1)}, JobState("pending", "priority"),
         "pending: priority"),
        # running
        ({"record": record()}, RUNNING, "starting: on n1, n2, no word from it yet"),
        ({**begun(from_step=None), "record": record()}, RUNNING, "starting: for 1m40s"),
        ({**begun(from_step=40), "record": record()}, RUNNING,
         "starting: at step 40, before its first step"),
        ({**begun(), "record": record()}, RUNNING, "running"),
        ({**begun(), "record": record(), "stop": ""}, RUNNING,
         "saving: asked to stop by lmscale stop"),
        ({**begun(), "record": record(), "beat_time": NOW - 120}, RUNNING,
         "running, but no heartbeat for 2m00s (n1)"),
        ({**begun(), "record": record(), "lines_time": NOW - 900}, RUNNING,
         "running, but no new step for 15m00s"),
        ({**begun(event("stuck", at=-1, rank=3, reason="rank 3 on n2 is stuck in data: no rank has moved for 40 s")),
          "record": record()}, RUNNING, "running: rank 3 on n2 is stuck in data: no rank has moved for 40 s"),
        # it has moved since
        ({**begun(event("stuck", at=-9, rank=3, reason="rank 3 is stuck")),
          "record": record()}, RUNNING, "running"),
        ({**begun(event("restart", code=75, reason="retry, 75")), "record": record()}, RUNNING,
         "waiting to start again: a peer or the storage was lost, 75"),
        ({**begun(event("exit", code=85, reason="saved, 85")), "record": record()}, RUNNING,
         "waiting to start again: saved and stopped on request, 85"),
        ({**begun(event("exit", code=85, reason="saved, 85")), "record": record(), "stop": ""},
         RUNNING, "stopped: by lmscale stop"),
        # ended
        ({**begun(event("exit", code=0, reason="done, 0")), "record": record(), "finished": 100},
         JobState("ended", code=0), "finished"),
        ({**begun(event("exit", code=0, reason="done, 0")), "record": record()},
         JobState("ended", code=0), "stopped: at train.stop_at, step 40"),
        ({**begun(event("exit", pid=2, code=65, reason="shard 3 is damaged\nrestore it"),
                  event("exit", code=65, reason="data, 65")), "record": record()},
         JobState("ended", code=65), "failed: damaged data, 65: shard 3 is damaged"),
        ({**begun(event("exit", code=75, reason="retry, 75")), "record": record(),
          "stop": "retry, 75; not started again: 3 restarts since the newest checkpoint"},
         JobState("ended", code=0), "failed: a peer or the storage was lost, 75; "
         "not started again: 3 restarts since the newest checkpoint"),
        ({**begun(), "record": record(), "beat_time": NOW - 99, "stop": "not started: 4 restarts"},
         JobState("ended", code=0), "failed: not started: 4 restarts"),
        ({**begun(event("died", rank=3, node="n2", code=137, reason="died by SIGKILL, 137"),
                  event("died", rank=1, node="n1", code=143, reason="died by SIGTERM, 143"),
                  event("exit", code=137, reason="died by SIGKILL, 137")), "record": record()},
         JobState("ended", code=137), "failed: died by SIGKILL, 137: rank 3 on n2"),
        ({**begun(event("lost_node", node="n2", number=1, reason="not heard of for 10 s"),
                  event("exit", code=75, reason="retry, 75")), "record": record()}, RUNNING,
         "waiting to start again: a peer or the storage was lost, 75: n2 is lost: "
         "not heard of for 10 s"),
        ({**begun(event("exit", code=75, reason="retry, 75: the disk of n1 is full")),
          "record": record()}, RUNNING,
         "waiting to start again: a peer or the storage was lost, 75: the disk of n1 is full"),
        ({**begun(), "record": record()}, JobState("ended", "cancelled by alice", raw="CANCELLED by 7"),
         "stopped: cancelled with scancel by alice; `lmscale resume` continues from its newest "
         "checkpoint; n1 was heard of 3s ago"),
        ({"record": record()}, JobState("ended", "cancelled", code=143, raw="CANCELLED"),
         "stopped: cancelled with scancel; `lmscale resume` continues from its newest checkpoint"),
        ({**begun(event("exit", code=85, reason="saved, 85")), "record": record()},
         JobState("ended", "cancelled by user 7", raw="CANCELLED"),
         "stopped: cancelled with scancel by user 7; `lmscale resume` continues from its newest "
         "checkpoint; it ended with saved and stopped on request, 85"),
        ({"record": record(kind="local")}, JobState("ended", "killed"),
         "lost: killed: its process disappeared without writing an exit event"),
        ({**begun(), "record": record(), "beat_time": NOW - 99},
         JobState("ended", "a node failed", raw="NODE_FAIL"), "failed: a node failed"),
        ({"record": record()}, JobState("ended", "no log could be opened", code=53),
         "failed: no log could be opened, exit code 53"),
        ({"record": record()}, JobState("ended", code=78),
         "failed: configuration, 78; its log may say why"),
        ({"record": record(), "stop": ""}, JobState("ended", "cancelled", raw="CANCELLED"),
         "stopped: by lmscale stop, before it started"),
        (
            {**begun(), "record": record()},
            JobState("running", "suspended", ("n1",)),
            "running: suspended",
        ),
        (
            {
                **begun(
                    event("stuck", rank=3, reason="rank 3 on n2 is stuck in data of step 9"),
                    event("restart", code=137, reason="died by SIGKILL, 137"),
                ),
                "record": record(),
            },
            RUNNING,
            "waiting to start again: died by SIGKILL, 137: rank 3 on n2 is stuck in data of step 9",
        ),
        # withdrawn, and minutes later Slurm has forgotten it
        ({"record": record(), "stop": ""}, JobState("unknown", "Slurm no longer knows job 17", raw="FORGOTTEN"),
         "stopped: by lmscale stop, before it started"),
        # nobody knows: never failed
        ({"record": record()}, JobState("ended"), "lost: the job ended without writing an exit event"),
        ({"record": record()}, UNKNOWN, "unknown: slurm did not answer: timed out"),
        ({**begun(), "record": record()}, UNKNOWN, "running: slurm did not answer: timed out"),
        ({**begun(), "record": record(), "beat_time": NOW - 300}, UNKNOWN,
         "unknown: no heartbeat for 5m00s (n1); slurm did not answer: timed out"),
        ({**begun(event("exit", code=75, reason="retry, 75")), "record": record()}, UNKNOWN,
         "unknown: a peer or the storage was lost, 75; slurm did not answer: timed out"),
        ({**begun(event("exit", code=65, reason="data, 65")), "record": record()}, UNKNOWN,
         "failed: damaged data, 65; slurm did not answer: timed out"),
        ({"trouble": "reading /runs/big: permission denied"}, None,
         "unknown: reading /runs/big: permission denied"),
        # by hand
        ({}, None, "unknown: not started yet"),
        ({**begun(by_hand=True), "alive": True}, None, "running"),
        (begun(by_hand=True), None, "running"),
        ({**begun(by_hand=True), "alive": False}, None,
         "lost: its process on n1 disappeared without writing an exit event"),
        ({**begun(by_hand=True), "beat_time": NOW - 300}, None,
         "lost: no heartbeat for 5m00s (n1)"),
        ({**begun(by_hand=True), "alive": False, "stop": ""}, None,
         "stopped: by lmscale stop, without saving"),
        (begun(event("exit", code=85, reason="saved, 85"), by_hand=True), None,
         "stopped: saved and stopped on request, 85"),
        (begun(event("exit", code=86, reason="diverged, 86"), by_hand=True), None,
         "failed: diverged, 86"),
        # by hand, after the job of the same folder has ended, or while it waits
        ({**begun(by_hand=True), "record": record(job="9")},
         JobState("ended", "a node failed", raw="NODE_FAIL"), "running"),
        ({**begun(event("exit", code=85, reason="saved, 85"), by_hand=True), "record": record(job="9")},
         JobState("pending", "priority"), "pending: priority"),
    ],
)  # fmt: skip
def test_states_and_reasons(facts: dict[str, Any], answer: JobState | None, words: str) -> None:
    assert standing(facts, answer).in_words() == words


def test_numbers_are_of_the_current_start() -> None:
    one = standing(
        {**begun(from_step=30), "record": record(), "saved": SavedCheckpoint(35, NOW - 60)}, RUNNING
    )
    assert (one.step, one.total_steps, one.loss) == (40, 100, 3.0)
    assert (one.tokens_per_s, one.eta_s) == (
        500.0,
        120.0,
    )  # 60 steps of 1000 tokens at 500 a second
    assert (one.nodes, one.hosts) == (2, ("n1", "n2"))
    assert (one.checkpoint_step, one.checkpoint_age_s) == (35, 60)
    saves = [event("save", at=n - 60, step=n) for n in range(0, 40, 10)]  # a second a step
    assert standing({**begun(*saves, from_step=0), "record": record()}, RUNNING).eta_s == 60.0
    loading = standing({**begun(from_step=40), "record": record()}, RUNNING)
    assert (loading.step, loading.tokens_per_s, loading.eta_s) == (40, None, None)


def test_nodes_are_those_it_runs_on() -> None:
    facts = begun()
    facts["events"][0]["nodes"] = ["n1", "n2", "n3"]
    on_three = standing({**facts, "record": record()}, UNKNOWN)  # of an elastic job
    assert (on_three.nodes, on_three.hosts) == (3, ("n1", "n2", "n3"))
    assert standing({**facts, "record": record()}, RUNNING).nodes == 2
    assert standing({"record": record()}, JobState("pending")).nodes == 4
    by_mpi = standing({"record": record(kind="mpi")}, JobState("running", hosts=("login",)))
    assert by_mpi.nodes == 4  # a host file: only the host of mpirun itself is known


def test_restarts_are_those_that_no_person_made() -> None:
    made = [
        {"by_hand": True},
        {"by_hand": False},
        {"by_hand": False, "fresh": True},
        {"by_hand": False},
    ]
    assert standing({"starts": tuple(made)}).restarts == 2
    assert standing({"starts": tuple(made[1:2])}).restarts == 0


def test_a_name_given_twice_is_judged_by_its_last_start() -> None:
    again = [event("start", pid=7), event("attempt", pid=8, from_step=7, attempt=2)]
    facts = begun(event("exit", code=65, reason="data, 65"), *again)
    assert standing({**facts, "record": record()}, RUNNING).in_words() == "running"


KINDS = [
    "start",
    "attempt",
    "save",
    "restart",
    "stuck",
    "died",
    "lost_node",
    "bad_node",
    "exit",
    "??",
]
CODES = [None, 0, 1, 2, 65, 75, 78, 85, 86, 87, 130, 137, 999]
any_event = st.fixed_dictionaries(
    {"kind": st.sampled_from(KINDS)},
    optional={
        "time": st.floats(NOW - 1e4, NOW + 10), "start": st.sampled_from(["slurm-17-0", "hand-1"]),
        "host": st.sampled_from(["n1", "n2/7"]), "pid": st.integers(1, 3),
        "code": st.sampled_from(CODES), "reason": st.one_of(st.none(), st.text(max_size=9)),
        "by_hand": st.booleans(), "from_step": st.one_of(st.none(), st.integers(0, 50)),
        "rank": st.integers(0, 9), "node": st.sampled_from(["n1", ""]), "number": st.integers(0, 2),
        "step": st.integers(0, 60),
        "nodes": st.lists(st.text(max_size=3), max_size=2), "reasons": st.lists(st.text(max_size=3)),
    },
)  # fmt: skip
any_line = st.fixed_dictionaries(
    {},
    optional={
        "step": st.integers(1, 99), "loss": st.one_of(st.none(), st.floats(0, 9)),
        "tokens": st.integers(0, 10**9), "tokens_per_s": st.one_of(st.none(), st.floats(0, 1e6)),
    },
)  # fmt: skip
any_answer = st.builds(
    JobState,
    standing=st.sampled_from(["pending", "running", "ended", "unknown"]),
    reason=st.sampled_from(["", "priority", "slurm did not answer: x"]),
    hosts=st.sampled_from([(), ("n1",), ("n1", "n2")]),
    code=st.sampled_from(CODES),
    raw=st.sampled_from(["", "CANCELLED", "NODE_FAIL", "COMPLETED"]),
)


@st.composite
def any_facts(draw: st.DrawFn) -> RunFacts:
    events = tuple(draw(st.lists(any_event, max_size=6)))
    return RunFacts(
        FOLDER,
        starts=events[:1],
        events=events,
        beat_time=draw(st.one_of(st.none(), st.floats(NOW - 500, NOW + 5))) if events else None,
        alive=draw(st.sampled_from([None, True, False])),
        lines=tuple(draw(st.lists(any_line, max_size=4))),
        lines_time=draw(st.one_of(st.none(), st.floats(NOW - 5000, NOW + 5))),
        saved=draw(st.sampled_from([None, SavedCheckpoint(3, NOW - 1)])),
        finished=draw(st.sampled_from([None, 50])),
        stop=draw(st.sampled_from([None, "", "gave up: 3 restarts"])),
        record=draw(st.sampled_from([None, record(), record(kind="local", job="5", time=NOW - 9)])),
        planned_steps=draw(st.sampled_from([None, 50])),
    )


@settings(max_examples=400, deadline=None)
@given(facts=any_facts(), answer=st.one_of(st.none(), any_answer))
def test_whatever_stands_there_it_can_be_told(facts: RunFacts, answer: JobState | None) -> None:
    answer = answer if facts.record is not None else None
    one = judge(facts, answer, now=NOW)
    assert not (one.active and one.ended)
    assert one.reason or one.state not in ("failed", "lost", "unknown", "stopped")
    assert one.eta_s is None or one.eta_s >= 0
    assert json.loads(json.dumps(as_object(one)))["state"] == one.state
    told = answer is not None and answer.standing == "ended"
    if (
        one.state == "failed"
    ):  # somebody has said so: a start by its exit, the launcher, the cluster
        assert told or facts.stop or any(event["kind"] == "exit" for event in facts.events)
    if answer is not None and answer.standing == "pending":
        assert not one.ended


@given(facts=any_facts(), answer=any_answer)
def test_a_silent_cluster_makes_nothing_worse(facts: RunFacts, answer: JobState) -> None:
    silent = JobState("unknown", "slurm did not answer: x")
    by_folder, by_both = judge(facts, None, now=NOW), judge(facts, silent, now=NOW)
    if by_folder.active:
        assert by_both.active or by_both.state == "unknown"
    if by_both.state == "failed":
        assert by_folder.state == "failed"


FINAL = JobEnd(78, "a command of the site failed with 1: module load cuda", again=False)
AGAIN = JobEnd(137, "job 18 follows", again=True)
FAILED_BY_SCRIPT = (
    "failed: configuration, 78: a command of the site failed with 1: module load cuda"
)


@pytest.mark.parametrize(
    ("facts", "answer", "words"),
    [
        ({"end": FINAL}, JobState("ended", "failed", code=78), FAILED_BY_SCRIPT),
        ({"end": FINAL}, UNKNOWN, FAILED_BY_SCRIPT),
        ({"end": AGAIN}, UNKNOWN, "unknown: slurm did not answer: timed out"),
        (
            {"end": AGAIN, "events": (event("start"),)},
            JobState("pending"),
            "waiting to start again: died by SIGKILL, 137: job 18 follows",
        ),
        ({"end": JobEnd(0, "not started: /r/stop exists", again=False)}, JobState("ended", code=0),
         "stopped: not started: /r/stop exists"),
    ],
)  # fmt: skip
def test_what_the_batch_script_wrote_is_read_before_anything_is_reconstructed(
    facts: dict[str, Any], answer: JobState, words: str
) -> None:
    assert standing({"record": record(), **facts}, answer).in_words() == words


@pytest.mark.parametrize("content", ["", "{", "[]", '{"code": "x"}', '{"code": 1e999}'])
def test_a_decision_that_cannot_be_decoded_counts_as_absent(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path)
    folder.jobs.mkdir()
    write_record(folder, record(number=1))
    (folder.jobs / "1.end").write_text(content)
    facts = RunFolderReader().read(folder)
    assert (facts.end, facts.trouble) == (None, "")
    body = {"version": 1, "job": "17", "start": "a", "code": 78, "reason": "r", "again": False}
    (folder.jobs / "1.end").write_text(json.dumps(body))
    assert RunFolderReader().read(folder).end == JobEnd(78, "r", again=False)


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("saving", "the time limit is near", "saving: the time limit is near"),
        ("waiting", "rank 3 died by SIGKILL", "waiting to start again: rank 3 died by SIGKILL"),
        ("running", "rank 3 is stuck", "running: rank 3 is stuck"),
        ("running", "", "starting: for 2m00s"),
    ],
)
def test_the_written_status_of_a_living_start_comes_first(
    state: Any, reason: str, words: str
) -> None:
    facts = {"record": record(), "events": (event("start", at=-120),), "beat_time": NOW - 1}
    written = StatusRecord("slurm-17-0", state, 3, reason, NOW - 9, NOW - 120, NOW - 1, "n1", 1)
    assert standing({**facts, "status": written}, RUNNING).in_words() == words
    other = replace(written, start="slurm-17-9")
    assert standing({**facts, "status": other}, RUNNING).in_words() == "starting: for 2m00s"
    silent = {**facts, "status": written, "beat_time": NOW - 100}
    assert "no heartbeat" in standing(silent, RUNNING).in_words()
