"""Jobs in the background of a host: real processes, their records, and what is said of them later."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lmscale.base.env import scrubbed
from lmscale.base.errors import ConfigError
from lmscale.base.proc import is_alive
from lmscale.config.cluster_schema import ClusterConfig
from lmscale.run_folder.events import EventLog
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters import background
from lmscale_launcher.clusters.job import JobPlan, JobRecord
from lmscale_launcher.clusters.local import LocalCluster


def plan_of(folder: Path, **cluster: object) -> JobPlan:
    section = ClusterConfig.model_validate(cluster)
    return JobPlan(
        name="run", run_dir=folder / "run", number=1, nodes=section.nodes, min_nodes=section.nodes,
        ranks_per_node=2, gpus_per_node=0, workdir=folder, python=sys.executable, cluster=section,
    )  # fmt: skip


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_WATCH_S", 1.0)


def test_variables_of_the_job_around_us_stay_behind() -> None:
    env = {
        "SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/s.conf", "SBATCH_PARTITION": "x", "SRUN_DEBUG": "1",
        "PMIX_RANK": "0", "PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2", "PRTE_MCA_x": "1",
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1",
        "LMSCALE_START": "s", "TORCHELASTIC_RUN_ID": "r", "MPI_LOCALNRANKS": "2",
        "PATH": "/bin", "RANKING": "kept", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "3",
    }  # fmt: skip
    kept = {"SLURM_CONF", "PATH", "RANKING", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}
    assert scrubbed(env).keys() == kept


def test_a_job_outlives_its_submitter_in_a_session_of_its_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    say = "import os, time; print(os.getsid(0), os.environ['LMSCALE_START'], flush=True); time.sleep(30)"
    record = background.start(plan, script(say), {**os.environ, "RANK": "1"})
    pid = int(record.job)
    try:
        assert plan.log.read_text() == f"{pid} local-1\n"
        assert b"\0RANK=" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert LocalCluster().states([(plan.folder, record)])[0].standing == "running"
        later = replace(record, facts={**record.facts, "ticks": record.facts["ticks"] + 1})
        assert background.state(plan.folder, later).standing == "ended"  # the pid is another's now
        background.kill(later)
        assert is_alive(pid, record.facts["ticks"])
    finally:
        background.kill(record)
    os.waitpid(pid, 0)
    state = background.state(plan.folder, record)
    assert (state.standing, state.code, state.reason) == ("ended", None, "killed")
    background.kill(record)  # of what has ended: nothing


def test_an_end_within_seconds_is_known_with_its_code(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    record = background.start(plan, script("import sys; sys.exit('wrong')"), os.environ)
    assert plan.log.read_text() == "wrong\n"
    state = background.state(plan.folder, record)
    assert (state.standing, state.code) == ("ended", 1)
    died = background.start(plan, script("import os; os.kill(os.getpid(), 9)"), os.environ)
    assert died.facts["code"] == 137


def test_ctrl_c_ends_the_looking_and_leaves_job_and_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_WATCH_S", 20.0)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    begun = time.monotonic()
    record = background.start(plan_of(tmp_path), script("import time; time.sleep(30)"), os.environ)
    timer.join()
    try:
        assert time.monotonic() - begun < 10
        assert is_alive(int(record.job), record.facts["ticks"])
    finally:
        background.kill(record)
    os.waitpid(int(record.job), 0)


def test_a_program_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with pytest.raises(ConfigError, match="cannot start /nowhere"):
        background.start(plan, ["/nowhere"], os.environ)
    assert not plan.log.exists()


def test_what_it_wrote_at_its_end_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    write = (
        "import sys, time; from pathlib import Path; from lmscale.run_folder.events import EventLog; "
        "from lmscale.run_folder.paths import RunFolder; log = EventLog(RunFolder(Path(sys.argv[1])), 'local-1'); "
        "log.write('start'); time.sleep(1.5); log.write('start'); log.write('exit', code=85, reason='saved')"
    )
    record = background.start(plan, [*script(write), str(plan.run_dir)], os.environ)
    assert "code" not in record.facts
    os.waitpid(int(record.job), 0)
    state = background.state(plan.folder, record)
    assert (state.standing, state.code, state.reason, state.restarts) == ("ended", 85, "saved", 1)


def test_on_another_host_the_heartbeat_tells_and_silence_is_no_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmscale.run_folder.events.this_host", lambda: "far/1")
        log = EventLog(folder, "local-1")
        log.write("start")
    record = JobRecord(
        1, "local", str(os.getpid()), "far", time.time() - 100, 1, 1, 2, {"host": "far/1", "ticks": 5}
    )  # fmt: skip
    assert background.state(folder, record).standing == "running"
    os.utime(log.path, (time.time() - 90,) * 2)
    state = background.state(folder, record)
    assert state.standing == "unknown"
    assert "far has written no heartbeat for 9" in state.reason
    with pytest.raises(ConfigError, match="on far"):
        background.kill(record)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmscale.run_folder.events.this_host", lambda: "far/1")
        other = EventLog(folder, "local-1")
        other.write("exit", code=0, reason="done")
        other.close()
    log.close()
    assert background.state(folder, record).standing == "ended"


def test_local_refuses_several_nodes_and_previews_a_line_for_a_shell(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.nodes: 2, but kind local"):
        LocalCluster().preview(plan_of(tmp_path, nodes=2))
    odd = tmp_path / "a folder's"
    text = LocalCluster().preview(plan_of(odd))
    assert not odd.exists()
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, timeout=10, check=False)
    assert done.returncode == 0, done.stderr
    assert "--nproc 2" in text


def test_signals_to_the_dead_are_no_error() -> None:
    child = subprocess.Popen(["true"])
    child.wait(timeout=5)
    background.signal_to(child.pid, signal.SIGTERM)
