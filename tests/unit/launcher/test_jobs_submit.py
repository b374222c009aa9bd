"""submit, resume and stop against a cluster that does as it is told."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmscale.base.errors import ConfigError, ExitCode, RetryableError, UsageError
from lmscale.config.identity import identity
from lmscale.config.run_file import load
from lmscale.run_folder.attempts import claim, settle
from lmscale.run_folder.checkpoints import describe_file, write_manifest
from lmscale.run_folder.events import EventLog
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.base import Cluster, JobState
from lmscale_launcher.clusters.job import JobPlan, JobRecord
from lmscale_launcher.jobs import stop as stopping
from lmscale_launcher.jobs import submit as submitting
from lmscale_launcher.jobs.job_plan import read_records
from lmscale_launcher.jobs.resume import newest_config, resume
from lmscale_launcher.jobs.run_facts import find_run_folder
from lmscale_launcher.jobs.stop import stop
from lmscale_launcher.jobs.submit import submit

RUN = """
model: {num_layers: 2, hidden_size: 32, num_heads: 2}
data: {corpora: [{path: corpus}]}
optim: {lr: 1e-3}
train: {steps: 40, global_batch_size: 8, micro_batch_size: 2, seq_len: 32}
cluster: {kind: slurm, nodes: 2, min_nodes: 1, ranks_per_node: 2, max_restarts: 1}
"""


class Site(Cluster):
    """A cluster in memory, with the properties of Slurm."""

    stop_poll_interval_s = 0.05
    confirms_job_end = True
    excludes_bad_nodes = True
    nodes_are_like_this_host = False

    def __init__(self) -> None:
        self.state = JobState("pending", "more nodes than are free", raw="PENDING")
        self.submitted: list[JobPlan] = []
        self.seen_stop: list[bool] = []
        self.calls: list[str] = []
        self.refusal: Exception | None = None

    def preview(self, plan: JobPlan) -> str:
        return f"sbatch {plan.script}\n"

    def submit(self, plan: JobPlan) -> JobRecord:
        assert load(plan.config).cluster.nodes == plan.nodes
        self.seen_stop.append(plan.folder.stop.exists())
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(plan)
        return JobRecord(
            plan.number, "slurm", str(100 + plan.number), "login", time.time(), plan.nodes,
            plan.min_nodes, plan.ranks_per_node,
        )  # fmt: skip

    def states(self, jobs: Sequence[tuple[RunFolder, JobRecord]]) -> list[JobState]:
        self.calls.append("states")
        return [self.state for _ in jobs]

    def cancel(self, folder: RunFolder, record: JobRecord) -> None:
        self.calls.append("cancel")
        self.state = JobState("ended", "cancelled", raw="CANCELLED")

    def withdraw(self, folder: RunFolder, record: JobRecord) -> bool:
        self.calls.append("withdraw")
        waited = self.state.standing == "pending"
        if waited:
            self.state = JobState("ended", "cancelled", raw="CANCELLED")
        return waited


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    found = Site()
    monkeypatch.setattr(submitting, "cluster_of", lambda kind: found)
    monkeypatch.setattr(stopping, "cluster_of", lambda kind: found)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "corpus").mkdir()
    return found


def run_folder() -> RunFolder:
    return RunFolder(Path.cwd() / "runs" / "run")


def submitted(*overrides: str, dry_run: bool = False) -> int:
    return submit("run.yaml", overrides, dry_run=dry_run, as_json=False)


def saved(step: int) -> RunFolder:
    """A checkpoint of the run, with its identity."""
    cfg, run = load("run.yaml"), run_folder()
    settle(run, claim(run, {}), 0)
    path = run.checkpoint(step, 1)
    path.mkdir(parents=True)
    (path / "a.safetensors").write_bytes(b"x" * 100)
    files = {"a.safetensors": describe_file(path / "a.safetensors")}
    same = identity(cfg, corpora=["c"], tokenizer="t", streams=7)
    body = {"format": 1, "step": step, "attempt": 1, "files": files, "identity": same}
    write_manifest(path, body)
    return run


def test_a_job_is_written_down_and_the_next_commands_are_named(site: Site, capsys: Any) -> None:
    assert submitted("train.steps=30") == 0
    run = run_folder()
    (record,) = read_records(run)
    assert (record.job, record.nodes, record.min_nodes) == ("101", 2, 1)
    assert load(run.jobs / "1.yaml").train.steps == 30
    out = capsys.readouterr().out
    assert "pending (more nodes than are free)" in out
    for verb in ("lmscale status run", "lmscale logs run -f", "lmscale stop run"):
        assert verb in out


def test_what_the_site_says_is_passed_on(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    submit_there = site.submit

    def told(plan: JobPlan) -> JobRecord:
        return replace(submit_there(plan), facts={"said": "sbatch: use qos=short"})

    monkeypatch.setattr(site, "submit", told)
    assert submitted() == 0
    out = capsys.readouterr().out
    assert "slurm reports: sbatch: use qos=short\n" in out
    assert "1 to 2 nodes x 2 ranks\n" in out


def test_ctrl_c_loses_no_job_that_has_just_been_queued(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    submit_there = site.submit

    def slow(plan: JobPlan) -> JobRecord:
        record = submit_there(plan)
        os.kill(os.getpid(), signal.SIGINT)
        return record

    monkeypatch.setattr(site, "submit", slow)
    assert submitted() == 0
    assert [record.job for record in read_records(run_folder())] == ["101"]
    assert "waiting until the job is recorded" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_cache_that_nothing_fills_is_said(site: Site, capsys: Any) -> None:
    assert submitted("data.cache_dir=/local/cache", dry_run=True) == 0
    assert "data.cache_dir" not in capsys.readouterr().out
    by_ranks = ("data.cache_dir=/local/cache", "cluster.slurm.launch=rank")
    assert submitted(*by_ranks, dry_run=True) == 0
    assert "note: data.cache_dir: nothing fills it" in capsys.readouterr().out


def test_a_dry_run_touches_nothing_and_asks_nobody(site: Site, capsys: Any) -> None:
    assert submitted(dry_run=True) == 0
    assert capsys.readouterr().out == f"sbatch {run_folder().jobs / '1.sh'}\n"
    assert not (Path.cwd() / "runs").exists()
    assert submit("run.yaml", [], dry_run=True, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["preview"].startswith("sbatch ")
    assert site.calls == []


def test_json_is_all_that_stands_on_standard_output(site: Site, capsys: Any) -> None:
    assert submit("run.yaml", [], dry_run=False, as_json=True) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["number"], body["job"], body["state"]) == (1, "101", "pending")
    assert body["log"] == str(run_folder().logs / "job-1.log")


@pytest.mark.parametrize("standing", ["pending", "running"])
def test_a_job_that_has_not_ended_is_named_and_no_second_one_made(
    site: Site, standing: Any
) -> None:
    submitted()
    site.state = JobState(standing)
    with pytest.raises(ConfigError, match=rf"job 1 \(slurm 101.*is {standing}") as refused:
        submitted()
    assert "lmscale stop run" in str(refused.value)
    with pytest.raises(ConfigError, match="job 1"):
        resume("run", [], dry_run=False, as_json=False)
    assert len(site.submitted) == 1


def test_a_run_of_this_host_that_is_alive_is_refused(site: Site) -> None:
    with EventLog(run_folder(), "by-hand") as log:
        log.write("start")
        with pytest.raises(ConfigError, match=rf"pid {os.getpid()}"):
            submitted()
    assert not run_folder().jobs.exists()


def test_the_stop_file_is_gone_before_the_job_is_there_and_back_when_it_is_refused(
    site: Site,
) -> None:
    run = run_folder()
    run.path.mkdir(parents=True)
    run.stop.write_text("budget spent")
    site.refusal = ConfigError("no such partition")
    with pytest.raises(ConfigError, match="no such partition"):
        submitted()
    assert run.stop.read_text() == "budget spent"
    assert [path.name for path in run.path.rglob("*")] == ["stop"]
    site.refusal = None
    submitted()
    assert not run.stop.exists()
    assert site.seen_stop == [False, False]


def test_a_refused_first_job_leaves_no_run_folder(site: Site) -> None:
    site.refusal = RetryableError("the controller does not answer")
    with pytest.raises(RetryableError):
        submitted()
    assert not run_folder().path.exists()


def test_what_the_file_itself_forbids_reaches_no_cluster(site: Site) -> None:
    shutil.rmtree("corpus")
    with pytest.raises(ConfigError, match="lmscale prepare"):
        submitted()
    (Path.cwd() / "corpus").mkdir()
    with pytest.raises(ConfigError, match="with 1 of the 1 to 2 nodes"):
        submitted("parallel.dp_shard=3")
    assert not (Path.cwd() / "runs").exists()
    assert not site.submitted


def test_a_finished_run_says_so(site: Site, capsys: Any) -> None:
    saved(40)
    assert submitted() == 0
    assert "finished" in capsys.readouterr().out
    assert not site.submitted


def test_a_job_that_ends_at_once_gives_its_log_and_its_code(site: Site, capsys: Any) -> None:
    run_folder().logs.mkdir(parents=True)
    (run_folder().logs / "job-1.log").write_text("error: no such thing\n")
    site.state = JobState("ended", code=65)
    assert submitted() == 65
    out = capsys.readouterr().out
    assert "error: no such thing" in out
    assert "has ended: damaged data, 65" in out
    site.state = JobState("ended", "NODE_FAIL")
    assert submitted() == ExitCode.RETRY


def test_resume_takes_the_newest_run_file_and_says_from_where(site: Site, capsys: Any) -> None:
    submitted("train.steps=40", "cluster.max_restarts=5")
    site.state = JobState("ended", code=1)
    run = saved(20)
    run.bad_nodes.mkdir()
    (run.bad_nodes / "n3").write_text("no space on /tmp\nmore\n")
    run.stop.touch()
    capsys.readouterr()
    site.state = JobState("ended")
    assert resume("run", ["cluster.nodes=1"], dry_run=True, as_json=False) == 0
    assert run.stop.exists()
    out = capsys.readouterr().out
    assert "resuming from step 20 (step-00000020-a1)" in out
    assert "excluded: n3 (no space on /tmp)" in out
    resume("run", ["cluster=local"], dry_run=True, as_json=False)
    assert "n3 is marked bad (no space on /tmp)" in capsys.readouterr().out
    site.state = JobState("running")
    with pytest.raises(ConfigError):
        resume("run", [], dry_run=False, as_json=False)
    site.state = JobState("ended", code=85)
    resume("run", ["cluster.nodes=1"], dry_run=False, as_json=False)
    assert (site.submitted[-1].nodes, site.submitted[-1].number) == (1, 2)
    assert site.submitted[-1].cluster.max_restarts == 5
    assert not run.stop.exists()
    assert newest_config(run).name == "2.yaml"


def test_resume_refuses_what_the_ranks_would(site: Site) -> None:
    submitted("train.stop_at=20", "train.resume=never")
    site.state = JobState("ended", code=0)
    saved(20)
    with pytest.raises(ConfigError, match=r"optim\.lr: 1\.0, but step-00000020-a1 .* 0\.001"):
        resume("run", ["optim.lr=1"], dry_run=False, as_json=False)
    with pytest.raises(ConfigError, match=r"lmscale resume run train\.stop_at=null"):
        resume("run", [], dry_run=False, as_json=False)
    with pytest.raises(UsageError, match="run_dir"):
        resume("run", ["train.run_dir=x"], dry_run=False, as_json=False)
    assert len(site.submitted) == 1
    resume("run", ["train.stop_at=null"], dry_run=False, as_json=False)
    assert load(site.submitted[-1].config).train.resume == "auto"


def test_a_moved_folder_goes_on_where_it_is(site: Site) -> None:
    submitted()
    site.state = JobState("ended", code=85)
    there = Path.cwd() / "moved: here"
    run_folder().path.rename(there)
    resume(str(there), [], dry_run=False, as_json=False)
    assert site.submitted[-1].run_dir == there
    assert find_run_folder(str(there)).path == there


def test_resume_of_a_run_without_run_file_names_the_way(site: Site) -> None:
    run_folder().events.mkdir(parents=True)
    with pytest.raises(ConfigError, match="lmscale submit"):
        resume("run", [], dry_run=False, as_json=False)
    with pytest.raises(ConfigError, match="no run folder"):
        resume("nothing", [], dry_run=False, as_json=False)


def test_stop_takes_a_waiting_job_out_of_the_queue(site: Site, capsys: Any) -> None:
    submitted()
    assert stop("run", now=False, as_json=False) == 0
    assert run_folder().stop.exists()
    assert "out of the queue" in capsys.readouterr().out
    assert "cancel" not in site.calls


def test_stop_waits_for_a_running_job_and_tells_how_it_ended(site: Site, capsys: Any) -> None:
    submitted()
    site.state = JobState("running", hosts=("n1",))

    def save() -> None:
        while not run_folder().stop.exists():
            time.sleep(0.01)
        with EventLog(run_folder(), "slurm-101-0") as log:
            log.write("save", step=12)
            log.write("exit", code=85, reason="saved")
        time.sleep(0.2)
        site.state = JobState("unknown", "the controller does not answer")
        time.sleep(0.2)
        site.state = JobState("ended", code=85)

    capsys.readouterr()
    thread = threading.Thread(target=save)
    thread.start()
    assert stop("run", now=False, as_json=True) == 0
    assert site.state.standing == "ended"  # an unknown state did not end the waiting
    thread.join()
    result = json.loads(capsys.readouterr().out)
    assert (result["what"], result["code"], result["checkpoint"]) == ("stopped", 85, 12)


def test_stop_now_cancels(site: Site, capsys: Any) -> None:
    submitted()
    site.state = JobState("running", hosts=("n1",))
    assert stop("run", now=True, as_json=False) == 0
    assert site.calls.count("cancel") == 1
    assert "killed; no checkpoint was saved" in capsys.readouterr().out
    assert run_folder().stop.exists()


@pytest.mark.parametrize("now", [True, False])
def test_a_job_that_slurm_has_ended_is_not_waited_for(
    site: Site, capsys: Any, monkeypatch: pytest.MonkeyPatch, now: bool
) -> None:
    submitted()
    with monkeypatch.context() as patch:
        patch.setattr("lmscale.run_folder.events.this_host", lambda: "far/1")
        with EventLog(run_folder(), "slurm-101-0") as log:  # a lost node's: its heartbeat is young
            log.write("start")
    site.state = JobState("ended", "a node failed", raw="NODE_FAIL")
    begun = time.monotonic()
    assert stop("run", now=now, as_json=False) == 0
    assert time.monotonic() - begun < 5
    assert "it is not running" in capsys.readouterr().out
    assert run_folder().stop.exists()


def test_stop_now_writes_the_stop_file_before_it_kills(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted()
    site.state = JobState("running", hosts=("n1",))
    seen: list[bool] = []

    def cancel(folder: RunFolder, record: JobRecord) -> None:
        seen.append(folder.stop.exists())
        site.state = JobState("ended", "cancelled", raw="CANCELLED")

    monkeypatch.setattr(site, "cancel", cancel)
    assert stop("run", now=True, as_json=False) == 0
    assert seen == [True]


def test_stop_without_an_answer_says_that_the_request_stands(site: Site, capsys: Any) -> None:
    submitted()
    site.state = JobState("unknown", "the controller does not answer")
    assert stop("run", now=False, as_json=False) == 0
    out = capsys.readouterr().out
    assert "the controller does not answer" in out
    assert "The request remains" in out
    assert run_folder().stop.exists()


def test_ctrl_c_ends_the_waiting_and_not_the_request(site: Site, capsys: Any) -> None:
    submitted()
    site.state = JobState("running", hosts=("n1",))
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(SystemExit) as ended:
        stop("run", now=False, as_json=False)
    timer.join()
    assert ended.value.code == 130
    assert "the request remains" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_is_submitted_where_the_file_system_has_no_locks(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: Any, number: int
) -> None:
    def refuses(file: object, what: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("lmscale.base.fs.fcntl.flock", refuses)
    assert submitted() == 0
    assert [record.job for record in read_records(run_folder())] == ["101"]
    assert "file locking is not supported here" in caplog.text


def test_without_locks_two_submits_are_two_jobs_or_one_refusal(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one has taken its number before the first one's run file was there."""
    monkeypatch.setattr(submitting, "next_number", lambda folder: 1)
    assert submitted() == 0
    site.state = JobState("ended", "", raw="COMPLETED")
    with pytest.raises(RetryableError, match=r"1\.yaml: File exists"):
        submitted()
    assert len(site.submitted) == 1


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"nul", b"\xff", b"[" * 100_000, b'{"number": ' + b"9" * 5000 + b"}",
     json.dumps({"number": 1, "kind": "slurm", "job": 7, "host": "h", "time": 0, "nodes": 1,
                 "min_nodes": 1, "ranks_per_node": 1}).encode(),
     json.dumps({"number": 1, "kind": "slurm", "job": "7", "host": "h", "time": 0, "nodes": 1,
                 "min_nodes": 1, "ranks_per_node": 1, "later": 1}).encode(),
     json.dumps({"number": 1, "kind": "local", "job": "7", "host": "h", "time": 0, "nodes": 1,
                 "min_nodes": 1, "ranks_per_node": 1, "facts": {"ticks": "x"}}).encode(),
     json.dumps({"number": 1, "kind": "local", "job": "x", "host": "h", "time": 0, "nodes": 1,
                 "min_nodes": 1, "ranks_per_node": 1, "facts": {"ticks": 1}}).encode()],
)  # fmt: skip
def test_a_file_that_is_not_a_job_record_is_named(tmp_path: Path, text: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.jobs.mkdir()
    (folder.jobs / "1.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"1\.json: .*; restore the file, or remove it"):
        read_records(folder)


def test_a_fifo_in_place_of_a_job_record_does_not_hang(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.jobs.mkdir()
    os.mkfifo(folder.jobs / "1.json")
    with pytest.raises(ConfigError, match="FIFO"):
        read_records(folder)
