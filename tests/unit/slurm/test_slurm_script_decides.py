"""Whether and how a job goes on: the real script, with stand-ins for Slurm's commands.

tests/cluster/ tries the same on a real Slurm. What scontrol says here was seen there (22.05).
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.job import JobRecord
from lmscale_launcher.jobs.job_plan import write_record
from lmscale_launcher.slurm.script import library, render
from tests.support.slurm_plans import plan

# One program under the names of all commands; it writes down what changes anything.
STAND_IN = r"""#!/bin/bash
here=${0%/*} name=${0##*/}
case "$name $*" in
    "scontrol "*"show job "*) cat "$here/job-${*: -1}" 2>/dev/null ;;
    "scontrol show hostnames "*) printf 'n1\nn2\n' ;;
    "scontrol show node n"[0-9]) ;;
    "scontrol show node "*) exit 1 ;;
    "squeue -h -t PENDING "*) cat "$here/queued" 2>/dev/null ;;
    "scontrol requeue "*) echo "requeue ${*:2}" >>"$here/calls"; exit "$(cat "$here/requeues")" ;;
    "squeue "*) cat "$here/end" ;;
    "sbatch "*)
        echo "$name $*" >>"$here/calls"
        env | grep -E '^(SLURM|LMSCALE|SBATCH)_' >"$here/seen"
        cat "$here/answer" 2>/dev/null ;;
    "scancel "*) echo "$name ${*: -1}" >>"$here/calls" ;;
    "srun "*) while [ "$1" != sh ]; do shift; done; SLURM_NODEID=1 exec "$@" ;;
esac
"""
# A rank or supervisor: writes down its environment, then does what the test says.
PROGRAM = """#!/bin/bash
env >"{run}/env"
echo "$@" >"{run}/args"
trap 'exit 85' USR2
. "{run}/act"
"""
RUNNING = "JobState=RUNNING Reason=None Requeue=1 Restarts=0 PreemptTime=None"
CANCELLED = "JobState=COMPLETING Reason=None Requeue=1 Restarts=0 PreemptTime=None"
TIMEOUT = "JobState=COMPLETING Reason=TimeLimit Requeue=1 Restarts=0 PreemptTime=None"
NODE_FAIL = "JobState=COMPLETING Reason=NodeDown Requeue=0 Restarts=0 PreemptTime=None"
PREEMPTED = "JobState=COMPLETING Reason=None Requeue=0 Restarts=0 PreemptTime=2026-11-24T16:02:38"
REQUEUED = "JobState=COMPLETING Reason=None Requeue=1 Restarts=1"
FOLLOW = "sbatch --parsable --dependency=afterany:100 --kill-on-invalid-dep=yes {script} 100 "


@dataclass(frozen=True)
class Site:
    """A run folder, and a folder of stand-ins."""

    run: Path
    bin: Path

    def job(self, number: int, told: str) -> None:
        """What scontrol says of a job."""
        text = f"JobId={number} JobName=a JobState=X UserId=me(1) {told} TimeLimit=01:00:00\n"
        (self.bin / f"job-{number}").write_text(text)

    def start(self, *argv: str, restarts: int = 0, **cluster: object) -> subprocess.Popen[str]:
        """The script of a job of this run, running as job 100."""
        job = plan(
            self.run, python=str(self.bin / "python"), workdir=self.run,
            cluster={"max_restarts": 1, **cluster},
        )  # fmt: skip
        job.script.write_text(render(job))
        job.library.write_text(library())
        env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "100",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1",
            "SLURM_JOB_NAME": "my run", "SBATCH_PARTITION": "other", "SLURM_CONF": "/etc/slurm.conf",
        }  # fmt: skip
        env |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        return subprocess.Popen(
            ["bash", job.script, *argv], env=env, cwd=self.run, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def end(self, act: str, *argv: str, restarts: int = 0, **cluster: object) -> int:
        """Run the script to its end, with ranks that do this."""
        (self.run / "act").write_text(act)
        process = self.start(*argv, restarts=restarts, **cluster)
        said, _ = process.communicate(timeout=30)
        print(said)
        return process.returncode

    @property
    def calls(self) -> list[str]:
        """What was changed in the queue."""
        path = self.bin / "calls"
        text = path.read_text() if path.exists() else ""
        return text.replace(str(self.run / "jobs" / "1.sh"), "{script}").splitlines()

    @property
    def decision(self) -> dict[str, object]:
        """RUN/jobs/1.end, besides the time."""
        body = json.loads((self.run / "jobs" / "1.end").read_text())
        assert abs(body.pop("time") - time.time()) < 60
        return body  # type: ignore[no-any-return]

    @property
    def env(self) -> dict[str, str]:
        """The environment of the first rank or supervisor."""
        lines = (self.run / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path / "my run", tmp_path / "bin")
    for folder in (made.bin, *(made.run / name for name in ("jobs", "bad-nodes", "checkpoints"))):
        folder.mkdir(parents=True)
    (made.bin / "python").write_text(PROGRAM.format(run=made.run))
    (made.bin / "slurm").write_text(STAND_IN)
    for path in made.bin.iterdir():
        path.chmod(0o755)
    for name in ("scontrol", "squeue", "sbatch", "scancel", "srun"):
        (made.bin / name).symlink_to("slurm")
    (made.bin / "requeues").write_text("0")
    (made.bin / "answer").write_text("501\n")
    (made.bin / "end").write_text("2100-01-01T00:00:00\n")
    made.job(100, RUNNING)
    made.job(501, RUNNING)
    return made


@pytest.mark.parametrize("code", [75, 85, 1, 137, 143])
def test_a_code_that_another_start_may_cure_puts_the_job_back(site: Site, code: int) -> None:
    assert site.end(f"exit {code}") == code
    assert site.calls == ["requeue 100"]


@pytest.mark.parametrize("code", [0, 2, 65, 78, 86, 87, 127, 255])
@pytest.mark.parametrize("requeue", [True, False])
def test_any_other_code_ends_the_run(site: Site, code: int, requeue: bool) -> None:
    assert site.end(f"exit {code}", slurm={"requeue": requeue}) == code
    assert site.calls == ([] if requeue else [FOLLOW, "scancel 501"])
    assert requeue or (site.run / "jobs" / "1.chain").read_text() == ""


def test_without_requeue_a_follow_up_waits_from_the_first_second(site: Site) -> None:
    act = f"cp '{site.bin}/calls' '{site.run}/early'; exit 75"
    assert site.end(act, slurm={"requeue": False}) == 75
    assert site.calls == [FOLLOW]
    assert "dependency=afterany:100" in (site.run / "early").read_text()
    assert (site.run / "jobs" / "1.chain").read_text() == "501\n"
    assert (site.bin / "seen").read_text() == "SLURM_CONF=/etc/slurm.conf\n"


def test_where_requeue_is_refused_a_follow_up_is_queued(site: Site) -> None:
    (site.bin / "requeues").write_text("1")
    assert site.end("exit 75") == 75
    assert site.calls == ["requeue 100", FOLLOW]


@pytest.mark.parametrize("requeue", [True, False])
def test_nothing_follows_a_cancelled_job(site: Site, requeue: bool) -> None:
    site.job(100, CANCELLED)
    assert site.end("exit 85", slurm={"requeue": requeue}) == 85
    assert site.calls == ([] if requeue else [FOLLOW, "scancel 501"])


@pytest.mark.parametrize("told", [TIMEOUT, NODE_FAIL, PREEMPTED])
def test_a_job_that_slurm_ended_goes_on_in_another(site: Site, told: str) -> None:
    site.job(100, told)
    assert site.end("exit 143") == 143
    assert site.calls == [FOLLOW]


def test_a_job_that_slurm_has_put_back_is_left_alone(site: Site) -> None:
    site.job(100, REQUEUED)
    assert site.end("exit 143") == 143
    assert site.calls == []


@pytest.mark.parametrize(("code", "ends"), [(85, 0), (75, 75), (0, 0)])
def test_nothing_follows_a_stopped_run(site: Site, code: int, ends: int) -> None:
    act = f"touch '{site.run}/stop'; exit {code}"
    assert site.end(act, slurm={"requeue": False}) == ends
    assert site.calls == [FOLLOW, "scancel 501"]


def test_a_stopped_run_is_not_started(site: Site) -> None:
    (site.run / "stop").write_text("")
    assert site.end("exit 1") == 0
    assert not (site.run / "env").exists()


def test_a_bad_node_is_left_out_of_the_next_job(site: Site) -> None:
    bad = site.run / "bad-nodes"
    act = f"touch '{bad}/n2' '{bad}/n3.site.org' '{bad}/elsewhere'; exit 75"
    assert site.end(act, slurm={"exclude": "n[7-8]"}) == 75
    assert site.calls == [
        f"sbatch --exclude=n[7-8],n2,n3 {FOLLOW.removeprefix('sbatch ')}n2,n3".strip()
    ]


def test_a_bad_node_that_is_left_out_already_needs_no_new_job(site: Site) -> None:
    (site.run / "bad-nodes" / "n2").write_text("no GPU")
    assert site.end("exit 75", "99", "n2") == 75
    assert site.calls == ["requeue 100"]


def test_a_follow_up_that_was_queued_too_early_is_replaced(site: Site) -> None:
    act = f"touch '{site.run}/bad-nodes/n2'; echo 502 >'{site.bin}/answer'; exit 75"
    assert site.end(act, slurm={"requeue": False}) == 75
    assert site.calls[1:] == [
        f"sbatch --exclude=n2 {FOLLOW.removeprefix('sbatch ')}n2",
        "scancel 501",
    ]
    assert (site.run / "jobs" / "1.chain").read_text() == "502\n"


@pytest.mark.parametrize("told", ["CANCELLED", "PENDING", "RUNNING"])
def test_a_follow_up_looks_how_the_job_before_has_ended(site: Site, told: str) -> None:
    site.job(99, RUNNING.replace("RUNNING", told))
    (site.run / "jobs" / "1.chain").write_text("100\n")
    assert site.end("exit 1", "99") == 0
    assert site.calls == []
    assert (site.run / "jobs" / "1.chain").read_text() == ""


def test_what_an_earlier_start_had_arranged_is_taken_back(site: Site) -> None:
    (site.run / "jobs" / "1.chain").write_text("90\n100\n400\n")
    assert site.end("exit 0", restarts=1) == 0
    assert site.calls == ["scancel 400"]
    assert (site.run / "jobs" / "1.chain").read_text() == "90\n100\n"


@pytest.mark.parametrize("launch", ["node", "rank"])
def test_starts_without_a_newer_checkpoint_are_bounded(site: Site, launch: str) -> None:
    slurm = {"launch": launch}
    assert site.end("exit 1", slurm=slurm) == 1
    assert site.end("exit 1", restarts=1, slurm=slurm) == 1
    (site.run / "checkpoints" / "step-00000003-a1.tmp").mkdir()
    (site.run / "env").unlink()
    assert site.end("exit 1", restarts=2, slurm=slurm) == 75
    assert not (site.run / "env").exists()
    assert "restarts without a newer checkpoint" in (site.run / "stop").read_text()


def test_a_newer_checkpoint_begins_the_count_anew(site: Site) -> None:
    for step in range(1, 5):
        (site.run / "checkpoints" / f"step-{step:08d}-a1").mkdir()
        assert site.end("exit 75", restarts=step) == 75
        assert site.end("exit 75", restarts=step) == 75
    assert not (site.run / "stop").exists()


def test_the_supervisors_environment(site: Site) -> None:
    assert site.end("exit 0", slurm={"signal_lead": 60}) == 0
    env = site.env
    assert env["LMSCALE_START"] == "slurm-100-0"
    assert (env["LMSCALE_NODES"], env["LMSCALE_NODE_RANK"]) == ("2", "1")
    assert env["LMSCALE_MASTER"] == "n1:20100"
    assert env["LMSCALE_FRESH"] == "1"
    end = time.mktime(time.strptime("2100-01-01", "%Y-%m-%d"))
    assert int(env["LMSCALE_DEADLINE"]) == end - 60
    args = (site.run / "args").read_text().split()
    assert args[-2:] == ["--nproc", "2"]


@pytest.mark.parametrize(("argv", "restarts"), [(("99",), 0), ((), 1)])
def test_only_a_persons_start_is_fresh(site: Site, argv: tuple[str, ...], restarts: int) -> None:
    assert site.end("exit 0", *argv, restarts=restarts) == 0
    assert "LMSCALE_FRESH" not in site.env
    assert site.env["LMSCALE_START"] == f"slurm-100-{restarts}"


@pytest.mark.parametrize("end", ["", "N/A\n", "Unknown\n"])
def test_the_deadline_without_an_answer_is_the_run_files_or_none(site: Site, end: str) -> None:
    (site.bin / "end").write_text(end)
    assert site.end("exit 0") == 0
    assert "LMSCALE_DEADLINE" not in site.env
    assert site.end("exit 0", time_limit=600, slurm={"signal_lead": 100}) == 0
    assert 470 < int(site.env["LMSCALE_DEADLINE"]) - time.time() <= 500


def test_in_rank_mode_the_telling_code_wins(site: Site) -> None:
    """srun ends with the highest code, 143 of the ranks that it ended because one ended with 78."""
    srun = site.bin / "srun"
    srun.unlink()
    srun.write_text(f'#!/bin/bash\n"{site.bin}/slurm-run" "$@"; exit 143\n')
    (site.bin / "slurm-run").write_text(STAND_IN.replace("${0##*/}", "srun"))
    for path in (srun, site.bin / "slurm-run"):
        path.chmod(0o755)
    assert site.end("exit 78", slurm={"launch": "rank"}) == 78
    assert site.calls == []
    assert site.env["MASTER_ADDR"] == "n1"
    assert site.env["MASTER_PORT"] == "20100"
    assert not list((site.run / "jobs").glob("*.codes*"))


def test_a_prolog_that_fails_ends_the_run(site: Site) -> None:
    assert site.end("exit 0", slurm={"prolog": ["true 'a b'", "false"], "requeue": False}) == 78
    assert site.calls == [FOLLOW, "scancel 501"]
    assert not (site.run / "env").exists()


WAIT = "for i in {1..300}; do sleep 0.1; done; exit 1"


def signalled(
    site: Site,
    send: Callable[[subprocess.Popen[str]], None],
    act: str = WAIT,
    **cluster: object,
) -> int:
    (site.run / "act").write_text(act)
    process = site.start(**cluster)
    until = time.monotonic() + 20
    while not (site.run / "args").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)  # for the trap of the program
    send(process)
    said, _ = process.communicate(timeout=20)
    print(said)
    return process.returncode


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_the_sites_signal_reaches_the_ranks_as_one_they_know(site: Site, name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    assert signalled(site, lambda job: job.send_signal(number), slurm={"signal": name}) == 85
    assert site.calls == ["requeue 100"]


def late(site: Site) -> str:
    """Ranks that save for two seconds: what the queue has seen by then, the trap itself has done."""
    return f"trap \"sleep 2; cp '{site.bin}/calls' '{site.run}/early'; exit 85\" USR2; {WAIT}"


def test_a_job_at_its_time_limit_arranges_what_follows_at_once(site: Site) -> None:
    def limit(job: subprocess.Popen[str]) -> None:
        site.job(100, TIMEOUT)
        job.send_signal(signal.SIGTERM)

    assert signalled(site, limit, late(site)) == 85
    assert site.calls == [FOLLOW]
    assert "afterany:100" in (site.run / "early").read_text()


def test_scancel_takes_back_the_follow_up_at_once(site: Site) -> None:
    def cancel(job: subprocess.Popen[str]) -> None:
        site.job(100, CANCELLED)
        job.send_signal(signal.SIGTERM)

    assert signalled(site, cancel, late(site), slurm={"requeue": False}) == 85
    assert site.calls == [FOLLOW, "scancel 501"]
    assert "scancel 501" in (site.run / "early").read_text()


@pytest.mark.parametrize(
    ("name", "told", "code", "calls"),
    [
        (
            "USR2",
            RUNNING,
            85,
            ["requeue 100"],
        ),  # the time limit, or preemption with a time of grace
        ("TERM", RUNNING, 143, ["requeue 100"]),
        ("TERM", PREEMPTED, 143, [FOLLOW]),
        ("TERM", REQUEUED, 143, []),
        ("TERM", CANCELLED, 143, []),
    ],
)
@pytest.mark.parametrize("when", ["first", "prolog"])
def test_a_signal_before_the_ranks_are_started_loses_no_run(
    site: Site, when: str, name: str, told: str, code: int, calls: list[str]
) -> None:
    """Slurm's TERM goes to all processes: a command of the prolog that it ends has not failed by itself."""
    site.job(100, told)
    # rm is the first program that the script itself starts.
    program = site.bin / ("rm" if when == "first" else "prolog")
    ended = "kill -TERM $$" if name == "TERM" else ""
    program.write_text(f"#!/bin/bash\nkill -{name} $PPID\n{ended}\n")
    program.chmod(0o755)
    soon = time.localtime(time.time() + 60)  # less than signal_lead
    (site.bin / "end").write_text(time.strftime("%Y-%m-%dT%H:%M:%S\n", soon))
    prolog = [str(program)] if when == "prolog" else []
    assert site.end("exit 0", slurm={"prolog": prolog}) == code
    assert site.calls == calls
    assert not (site.run / "env").exists()


@pytest.mark.parametrize(("launch", "code"), [("node", 0), ("rank", 85)])
def test_a_signal_a_minute_early_stops_no_supervisor(site: Site, launch: str, code: int) -> None:
    """Slurm's word, with a job as short as that each time; ranks alone would miss the time to save."""
    prolog = site.bin / "prolog"
    prolog.write_text("#!/bin/bash\nkill -USR2 $PPID\n")
    prolog.chmod(0o755)
    assert site.end("exit 0", slurm={"prolog": [str(prolog)], "launch": launch}) == code


def test_a_prolog_that_fails_is_named(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    assert site.end("exit 0", slurm={"prolog": ["cat '/no such/file'"]}) == 78
    assert "this failed with 1: cat '/no such/file'" in capfd.readouterr().out


def test_a_controller_that_hiccups_is_asked_again_after_a_second(site: Site) -> None:
    (site.bin / "job-100").rename(site.bin / "away")
    begun = time.monotonic()
    act = f"(sleep 0.5; mv '{site.bin}/away' '{site.bin}/job-100') >/dev/null 2>&1 & exit 75"
    assert site.end(act) == 75
    assert site.calls == ["requeue 100"]
    assert time.monotonic() - begun < 8


def test_at_the_time_limit_a_controller_that_hiccups_is_asked_again(site: Site) -> None:
    def limit(job: subprocess.Popen[str]) -> None:
        (site.bin / "answer").unlink()  # sbatch fails; the ranks still save when it no longer does
        site.job(100, TIMEOUT)
        job.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        (site.bin / "answer").write_text("501\n")

    early = f"cp '{site.run}/jobs/1.chain' '{site.run}/early'"
    act = f'trap "sleep 4; {early}; exit 85" USR2; {WAIT}'
    assert signalled(site, limit, act) == 85
    assert (site.run / "early").read_text() == "501\n"


def test_a_follow_up_whose_answer_was_lost_is_not_queued_again(site: Site) -> None:
    (
        site.bin / "answer"
    ).unlink()  # sbatch fails, as with "Socket timed out", but the job stands in the queue
    others = "498 afterany:1001(unfulfilled) my run\n499 afterany:100(unfulfilled) evaluate it\n"
    (site.bin / "queued").write_text(others + "500 afterany:100(unfulfilled) my run\n")
    site.job(100, TIMEOUT)
    site.job(500, RUNNING)
    assert site.end("exit 143") == 143
    assert site.calls == [FOLLOW]
    assert (site.run / "jobs" / "1.chain").read_text() == "500\n"


def test_a_follow_up_leaves_out_what_an_option_of_the_site_leaves_out(site: Site) -> None:
    act = f"touch '{site.run}/bad-nodes/n2'; exit 75"
    slurm = {
        "exclude": "n7",
        "sbatch": ["-x n8"],
    }  # the last word has the option, here as for sbatch
    assert site.end(act, slurm=slurm) == 75
    assert site.calls[0].startswith("sbatch --exclude=n8,n2 ")


@pytest.mark.parametrize(("recorded", "chain"), [("100", None), ("77", "100\n"), (None, None)])
def test_a_job_that_somebody_queued_with_sbatch_is_known_to_status(
    site: Site, recorded: str | None, chain: str | None
) -> None:
    if recorded:  # written by submit, seconds after its own job was queued
        record = JobRecord(1, "slurm", recorded, "here", 0.0, 2, 2, 2)
        write_record(RunFolder(site.run), record)
    assert site.end("exit 0") == 0
    path = site.run / "jobs" / "1.chain"
    assert (path.read_text() if path.exists() else None) == chain


def test_in_rank_mode_a_saved_run_is_stopped_whatever_srun_makes_of_it(site: Site) -> None:
    """The first rank that ends with 85 makes srun end the others: 143 is the highest code."""
    srun = site.bin / "srun"
    srun.unlink()
    srun.write_text(f'#!/bin/bash\n"{site.bin}/slurm-run" "$@"; exit 143\n')
    (site.bin / "slurm-run").write_text(STAND_IN.replace("${0##*/}", "srun"))
    for path in (srun, site.bin / "slurm-run"):
        path.chmod(0o755)
    act = f"touch '{site.run}/stop'; exit 85"
    assert site.end(act, slurm={"launch": "rank"}) == 0


def test_two_terms_at_once_queue_one_job(site: Site) -> None:
    """At the end of a time of grace, for one: while sbatch has not answered the first."""
    slow = STAND_IN.replace('    "sbatch "*)\n', '    "sbatch "*)\n        sleep 1\n')
    assert slow != STAND_IN
    (site.bin / "slurm").write_text(slow)

    def twice(job: subprocess.Popen[str]) -> None:
        site.job(100, TIMEOUT)
        job.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        job.send_signal(signal.SIGTERM)

    assert signalled(site, twice, f'trap "sleep 4; exit 85" USR2; {WAIT}') == 85
    assert site.calls == [FOLLOW]


@pytest.mark.parametrize(
    ("act", "state", "code", "reason", "again"),
    [
        ("exit 65", RUNNING, 65, "ended with 65: no other start can cure that", False),
        ("exit 75", RUNNING, 75, "the job was put back into the queue", True),
        ("exit 143", TIMEOUT, 143, "job 501 follows", True),
        ("exit 143", REQUEUED, 143, "Slurm has put the job back into the queue", True),
        ("exit 85", CANCELLED, 85, "the job was cancelled: not started again", False),
    ],
)
def test_the_decision_is_written_for_status(
    site: Site, act: str, state: str, code: int, reason: str, again: bool
) -> None:
    site.job(100, state)
    assert site.end(act) == code
    assert site.decision == {
        "version": 1, "job": "100", "start": "slurm-100-0", "code": code, "reason": reason, "again": again,
    }  # fmt: skip
    assert not list((site.run / "jobs").glob("*.tmp"))


def test_a_decision_quotes_what_failed_and_the_next_start_removes_it(site: Site) -> None:
    assert site.end("exit 0", slurm={"prolog": ["cat '/no such/\\\\ \"file'"]}) == 78
    assert str(site.decision["reason"]).startswith("a command of the site failed with 1: cat ")
    (site.run / "stop").write_text("")
    assert site.end("exit 0", restarts=1) == 0
    assert site.decision["reason"] == f"not started: {site.run}/stop exists"
    (site.run / "stop").unlink()
    act = f"test ! -e '{site.run}/jobs/1.end' || exit 9; exit 0"
    assert site.end(act, restarts=1) == 0


def test_a_library_of_another_version_starts_nothing(site: Site) -> None:
    process = site.start()
    process.kill()
    process.communicate()
    script = (site.run / "jobs" / "1.sh").read_text()
    assert "job_begin 1 " in script
    (site.run / "jobs" / "1.sh").write_text(script.replace("job_begin 1 ", "job_begin 0 "))
    done = subprocess.run(
        ["bash", site.run / "jobs" / "1.sh"], capture_output=True, text=True, timeout=20, check=False,
        env={"PATH": f"{site.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "100"},
    )  # fmt: skip
    assert done.returncode == 78
    assert "written for version 0 of its library" in done.stderr
