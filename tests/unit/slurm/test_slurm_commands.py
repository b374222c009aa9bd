"""Slurm's commands around a job: limits, words, refusals. Programs on PATH stand in only where no Slurm can be had."""

import json
import sys
import time
from pathlib import Path

import pytest

from lmscale.base.errors import ConfigError
from lmscale.config.cluster_schema import ClusterConfig
from lmscale.run_folder.paths import RunFolder
from lmscale_launcher.clusters.job import JobPlan, JobRecord
from lmscale_launcher.jobs.job_plan import next_number
from lmscale_launcher.slurm import (
    partitions as partition,
)
from lmscale_launcher.slurm import (
    preflight,
)
from lmscale_launcher.slurm import (
    query as commands,
)
from lmscale_launcher.slurm import (
    slurm_cluster as cluster,
)
from lmscale_launcher.slurm import (
    slurm_messages as refused,
)
from lmscale_launcher.slurm.query import SlurmResult, SlurmUnavailable
from lmscale_launcher.slurm.script import command
from lmscale_launcher.slurm.slurm_cluster import SlurmCluster, _job_id

GOLDEN = Path(__file__).parents[2] / "golden/slurm-answers"


def make_plan(
    tmp_path: Path, *, nodes: int = 1, min_nodes: int = 0, gpus_per_node: int = 0, **slurm: object
) -> JobPlan:
    time_limit, ranks = slurm.pop("time_limit", None), slurm.pop("ranks_per_node", 2)
    assert isinstance(ranks, int)
    return JobPlan(
        name="run", run_dir=tmp_path / "run", number=1, nodes=nodes, min_nodes=min_nodes or nodes,
        ranks_per_node=ranks, gpus_per_node=gpus_per_node, workdir=tmp_path, python=sys.executable,
        cluster=ClusterConfig.model_validate(
            {"kind": "slurm", "nodes": nodes, "time_limit": time_limit, "slurm": slurm}
        ),
    )  # fmt: skip


def partitions() -> list[partition.SlurmPartition]:
    def text(name: str) -> str:
        return (GOLDEN / name).read_text()

    return partition.read_partitions(text("partition-22.05.txt"), text("sinfo-22.05.txt"))


def found(plan: JobPlan) -> list[tuple[str, str]]:
    request = partition.request_of(plan)
    return [(one.path, one.fact) for one in partition.problems(partitions(), request)]


def test_partitions_as_slurm_shows_them() -> None:
    main, short = (next(p for p in partitions() if p.name == name) for name in ("main", "short"))
    assert (main.default, main.max_time_s, main.max_nodes) == (True, 7 * 86400, None)
    assert (short.default, short.max_time_s, short.max_nodes) == (False, 300, 2)
    assert [node.name for node in main.nodes] == ["n1", "n2", "n3", "n4"]
    assert main.nodes[0].count_gpus() == main.nodes[0].count_gpus("h100") == 4
    assert [node.usable for node in main.nodes] == [True, True, True, False]  # n4 was powered off


@pytest.mark.parametrize(
    ("asked", "key", "words"),
    [
        ({"partition": "nope"}, "cluster.slurm.partition", "there is no partition nope"),
        ({"sbatch": ["-p nope"]}, "cluster.slurm.partition", "there is no partition nope"),
        ({"partition": "short", "time_limit": 600}, "cluster.time_limit", "10m00s, but partition short allows 5m00s"),
        ({"partition": "short", "nodes": 3}, "cluster.nodes", "3 nodes, but partition short allows 2 a job"),
        ({"partition": "short", "nodes": 3, "min_nodes": 2}, "cluster.nodes",
         "3 nodes, but partition short allows 2 a job"),  # measured: waits for ever, though 2 would do
        ({"nodes": 5}, "cluster.nodes", "5 nodes, but partition main has 4"),
        ({"nodes": 6, "min_nodes": 5}, "cluster.min_nodes", "5 nodes, but partition main has 4"),
        ({"gpus_per_node": 5}, "cluster.gpus_per_node",
         "5 GPUs a node, but the nodes of partition main have at most 4"),
        ({"gpus_per_node": 1, "gpu_type": "a100"}, "cluster.slurm.gpu_type",
         "1 a100 GPUs a node, but the nodes of partition main have none"),
        ({"cpus_per_task": 9}, "cluster.slurm.cpus_per_task",
         "9 cores a node, but the nodes of partition main have at most 8"),
        ({"cpus_per_task": 5, "launch": "rank"}, "cluster.slurm.cpus_per_task",
         "10 cores a node, but the nodes of partition main have at most 8"),
        ({"ranks_per_node": 9, "launch": "rank"}, "cluster.ranks_per_node",
         "9 cores a node, but the nodes of partition main have at most 8"),
        ({"memory": "20G"}, "cluster.slurm.memory",
         "20480 MiB a node, but the nodes of partition main have at most 16000"),
        ({"nodes": 3, "exclude": ["n[1-2]"]}, "cluster.nodes",
         "3 nodes, but only 2 of partition main are left besides the excluded ones"),
    ],
)  # fmt: skip
def test_what_can_never_be_had_is_said_before_anything_is_queued(
    tmp_path: Path, asked: dict[str, object], key: str, words: str
) -> None:
    assert found(make_plan(tmp_path, **asked)) == [(key, words)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked",
    [
        {}, {"nodes": 4}, {"nodes": 6, "min_nodes": 2}, {"gpus_per_node": 4},
        {"gpus_per_node": 8, "gpus": "none"},
        {"cpus_per_task": 8}, {"memory": "0"}, {"partition": "high,short", "time_limit": 3600},
        {"partition": "short", "time_limit": 600, "sbatch": ["--time=5"]},
        {"gpus_per_node": 8, "sbatch": ["--gres gpu:4"]}, {"cpus_per_task": 99, "sbatch": ["-c2"]},
    ],
)  # fmt: skip
def test_what_can_be_had_is_not_refused(tmp_path: Path, asked: dict[str, object]) -> None:
    assert found(make_plan(tmp_path, **asked)) == []  # type: ignore[arg-type]


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path, nodes=5, gpus_per_node=5, partition="short", time_limit=600, memory="20G"
    )
    assert [key for key, _ in found(plan)] == [
        "cluster.time_limit", "cluster.nodes", "cluster.gpus_per_node", "cluster.slurm.memory",
    ]  # fmt: skip


def test_nothing_is_refused_where_partitions_are_shown_in_another_way(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, nodes=99, partition="nope")
    assert partition.problems([], partition.request_of(plan)) == []


def test_a_node_that_is_down_makes_a_job_wait(tmp_path: Path) -> None:
    def waits(**asked: object) -> bool:
        plan = make_plan(tmp_path, **asked)  # type: ignore[arg-type]
        return partition.must_wait(partitions(), partition.request_of(plan))

    assert waits(nodes=4)
    assert waits(nodelist=["n4"])
    assert not waits(nodes=3)
    assert not waits(nodes=4, min_nodes=3)


def test_nodes_that_failed_their_check_are_left_out(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, exclude=["n[1-2]"])
    assert command(plan) == ["sbatch", "--parsable", str(plan.script)]
    plan.folder.bad_nodes.mkdir(parents=True)
    for host in ("n4.cluster.example", "n3", "gone"):
        (plan.folder.bad_nodes / host).write_text("no GPU")
    known = {node.name for one in partitions() for node in one.nodes}
    assert command(plan, known=known) == [
        "sbatch", "--parsable", "--exclude=n[1-2],n3,n4", str(plan.script), "", "n3,n4",
    ]  # fmt: skip
    assert "--exclude=n[1-2],gone,n3,n4" in command(plan)
    request = partition.request_of(plan, bad=["n3", "n4"])
    (problem,) = partition.problems(partitions(), request)
    assert "only 0 of partition main" in problem.fact


def test_the_preview_is_a_script_that_ends_with_the_command(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    text = SlurmCluster().preview(plan)
    assert text.startswith("#!/bin/bash\n#SBATCH")
    assert text.endswith(f"# queued by: cd {tmp_path} && sbatch --parsable {plan.script}\n")
    assert not plan.run_dir.exists()


REFUSALS = json.loads((GOLDEN / "sbatch-22.05.json").read_text())
KEYS = {
    "-p": "partition", "-A": "account", "--qos": "qos", "--reservation": "reservation", "-C": "constraint",
    "-w": "exclude", "-x": "exclude", "--foo": "sbatch", "--mpi": "sbatch", "--switches": "sbatch",
    "--licenses": "sbatch", "--dependency": "sbatch", "--gres": "gpu_type",
}  # fmt: skip


@pytest.mark.parametrize("told", REFUSALS, ids=lambda told: " ".join(told["options"]))
def test_each_refusal_of_sbatch_has_words_and_a_key(
    tmp_path: Path, told: dict[str, object]
) -> None:
    plan, listed = make_plan(tmp_path, partition="nope"), "what there is"
    problem = refused.in_words(int(str(told["code"])), str(told["err"]), plan, lambda kind: listed)
    assert problem.path.startswith("cluster.")
    assert problem.hint
    assert "sbatch" in problem.fact
    options = told["options"]
    assert isinstance(options, list)
    option = next(one for one in options if one != "--test-only").partition("=")[0]
    generic = "configuration is not available" in str(told["err"])
    if option in KEYS and not generic:
        assert problem.path == f"cluster.slurm.{KEYS[option]}"
    if option in ("-p", "-A", "--qos", "--reservation", "-C"):
        assert listed in problem.hint


def test_a_bad_option_names_the_key_it_comes_from(tmp_path: Path) -> None:
    def key(words: str, **slurm: object) -> str:
        plan = make_plan(tmp_path, **slurm)  # type: ignore[arg-type]
        return refused.in_words(255, words, plan, lambda kind: "").path

    assert key("sbatch: error: Invalid --time specification\n") == "cluster.time_limit"
    assert (
        key("sbatch: error: Invalid --mem specification\n", memory="lots") == "cluster.slurm.memory"
    )
    assert (
        key("sbatch: unrecognized option '--foo=1'\n", sbatch=["--foo=1"]) == "cluster.slurm.sbatch"
    )


def test_a_refusal_nobody_knows_is_told_as_it_is(tmp_path: Path) -> None:
    words = "sbatch: error: Batch job submission failed: The stars are wrong\n"
    problem = refused.in_words(1, words, make_plan(tmp_path), lambda kind: "")
    assert problem.fact == "sbatch refused the job: The stars are wrong"


def test_a_trial_that_fails_for_nodes_that_are_down_is_no_refusal() -> None:
    words = "allocation failure: Requested node configuration is not available\n"
    assert refused.passing(words, nodes_are_down=True)
    assert not refused.passing(words, nodes_are_down=False)
    assert not refused.passing(
        "allocation failure: Invalid qos specification\n", nodes_are_down=True
    )
    assert refused.passing("allocation failure: Requested nodes are busy\n", nodes_are_down=False)


# -- programs that stand in for a Slurm that cannot be had ---------------------------------------------


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, but for the shell's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "sleep", "env", "cat"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def put(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


UP = "echo 'Slurmctld(primary) at ctl is UP'"


def test_no_slurm_on_this_machine(programs: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Slurm on this machine: .*scontrol") as caught:
        commands.ping()
    assert "slurm-client" in caught.value.problems[0].hint
    assert "login node" in caught.value.problems[0].hint


def test_a_command_that_hangs_is_ended(programs: Path) -> None:
    put(programs, "scontrol", "echo $$ > $0.pid; exec sleep 600")
    begun = time.monotonic()
    with pytest.raises(SlurmUnavailable, match="did not answer within 1 s"):
        commands.ask("scontrol", "ping", timeout_s=1)
    assert time.monotonic() - begun < 5
    assert not Path(f"/proc/{(programs / 'scontrol.pid').read_text().strip()}").exists()


def test_a_submission_that_hangs_may_have_been_made(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "SUBMIT_TIMEOUT_S", 0.5)
    put(programs, "sbatch", "exec sleep 600")
    with pytest.raises(SlurmUnavailable, match="may have been queued all the same"):
        commands.sbatch(["sbatch", "--parsable", "1.sh"], cwd=tmp_path)


@pytest.mark.parametrize(
    ("err", "words"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "controller does not answer"),
        ("slurm_load_jobs error: Socket timed out on send/recv operation", "controller does not answer"),
        ("sbatch: error: Munge encode failed: Failed to access socket (Did you start munged?)", "munged must run"),
        ("sbatch: error: Batch job submission failed: Protocol authentication error", "munged must run"),
        ("slurmctld: error: Munge decode failed: Rewound credential", "clocks"),
        ("squeue: error: Incompatible versions of client and server code", "incompatible versions"),
    ],
)  # fmt: skip
def test_who_cannot_be_asked_says_so(programs: Path, err: str, words: str) -> None:
    put(programs, "squeue", f"echo '{err}' >&2; exit 1")
    with pytest.raises(SlurmUnavailable, match=words):
        commands.ask("squeue")


def test_slurm_that_is_not_set_up(programs: Path) -> None:
    put(
        programs, "squeue", "echo 'squeue: fatal: Unable to process configuration file' >&2; exit 1"
    )
    with pytest.raises(ConfigError, match="SLURM_CONF"):
        commands.ask("squeue")


def test_commands_get_a_clean_environment(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SQUEUE_PARTITION", "LMSCALE_START"):
        monkeypatch.setenv(name, "leaked")
    monkeypatch.setenv("SLURM_CONF", "/etc/there.conf")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    put(programs, "squeue", "exec env")
    seen = dict(line.split("=", 1) for line in commands.ask("squeue").out.splitlines())
    assert "leaked" not in seen.values()
    assert seen["SLURM_CONF"] == "/etc/there.conf"
    assert seen["LC_ALL"] == "C"


def test_a_job_keeps_the_language_of_its_user(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    put(programs, "sbatch", "exec env")
    seen = commands.sbatch(["sbatch", "--parsable", "1.sh"], cwd=tmp_path).out
    assert "LC_ALL=C.UTF-8" in seen
    assert "SLURM_JOB_ID" not in seen


def jobs(tmp_path: Path, *ids: str) -> list[tuple[RunFolder, JobRecord]]:
    folder = RunFolder(tmp_path / "run")
    return [(folder, JobRecord(1, "slurm", job, "here", 0.0, 1, 1, 1)) for job in ids]


def test_all_jobs_are_asked_for_at_once(programs: Path, tmp_path: Path) -> None:
    put(programs, "scontrol", UP)
    put(programs, "squeue", f'echo "$*" >> {tmp_path}/asked; exec cat {GOLDEN}/squeue-23.11.json')
    found = SlurmCluster().states(jobs(tmp_path, "5", "6", "7", "15"))
    assert [state.standing for state in found] == ["running", "ended", "ended", "pending"]
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "15,5,6,7" in asked or "5,6,7,15" in asked


def test_squeue_without_json(programs: Path, tmp_path: Path) -> None:
    put(programs, "scontrol", UP)
    put(
        programs,
        "squeue",
        f"""case "$*" in *--json*) echo 'squeue: unrecognized option' >&2; exit 1;; esac
exec cat {GOLDEN}/squeue-22.05.txt""",
    )
    (state,) = SlurmCluster().states(jobs(tmp_path, "5"))
    assert (state.standing, state.hosts) == ("running", ("n1", "n2"))


def test_squeue_is_followed_by_sacct_and_that_by_scontrol(programs: Path, tmp_path: Path) -> None:
    put(programs, "squeue", 'echo "{\\"jobs\\": [], \\"errors\\": []}"')
    put(programs, "sacct", "echo '7|FAILED|75:0|2026-11-24T16:07:50|n1|run'")
    put(
        programs,
        "scontrol",
        f'[ "$1" = ping ] && {UP} && exit; exec cat {GOLDEN}/scontrol-22.05.txt',
    )
    found = SlurmCluster().states(jobs(tmp_path, "7", "5", "99"))
    assert [(state.standing, state.code) for state in found] == [
        ("ended", 75), ("running", None), ("unknown", None),
    ]  # fmt: skip
    assert found[2].raw == "FORGOTTEN"


@pytest.mark.parametrize(
    "squeue",
    [
        f"exec cat {GOLDEN}/squeue-22.05-no-controller.json",
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
        "echo 'something new' >&2; exit 3",
    ],
)
def test_without_an_answer_no_job_has_ended(programs: Path, tmp_path: Path, squeue: str) -> None:
    put(
        programs,
        "scontrol",
        f'[ "$1" = ping ] && {UP} && exit; echo "slurm_load_jobs error: no" >&2; exit 1',
    )
    put(programs, "squeue", squeue)
    put(programs, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    (state,) = SlurmCluster().states(jobs(tmp_path, "5"))
    assert state.standing == "unknown"
    assert state.raw != "FORGOTTEN"


def test_no_slurm_here_makes_all_jobs_unknown(programs: Path, tmp_path: Path) -> None:
    (state,) = SlurmCluster().states(jobs(tmp_path, "5"))
    assert state.standing == "unknown"
    assert "no Slurm on this machine" in state.reason


def test_a_number_that_came_again_is_told_apart_by_name(programs: Path, tmp_path: Path) -> None:
    put(programs, "scontrol", UP)
    put(programs, "squeue", f"exec cat {GOLDEN}/squeue-22.05.json")
    put(programs, "sacct", "exit 1")
    folder = RunFolder(tmp_path / "run")
    found = SlurmCluster().states(
        [(folder, JobRecord(1, "slurm", "5", "here", 0.0, 1, 1, 1, {"name": name}))
         for name in ("train", "lost")]
    )  # fmt: skip
    assert [state.standing for state in found] == ["running", "unknown"]


def test_follow_up_jobs_count_as_the_run(programs: Path, tmp_path: Path) -> None:
    put(programs, "scontrol", UP)
    put(programs, "squeue", f"exec cat {GOLDEN}/squeue-22.05.json")
    folder = RunFolder(tmp_path / "run")
    folder.jobs.mkdir(parents=True)
    (folder.jobs / "1.chain").write_text("6\n5\n")
    (state,) = SlurmCluster().states(jobs(tmp_path, "7"))
    assert state.standing == "running"


def test_the_job_id_is_found_beside_a_sites_own_words() -> None:
    assert _job_id(SlurmResult(("sbatch",), 0, "17\n", "")) == "17"
    assert _job_id(SlurmResult(("sbatch",), 0, "Welcome!\n17;alps\n", "")) == "17"
    with pytest.raises(Exception, match="named no job"):
        _job_id(SlurmResult(("sbatch",), 0, "thanks\n", ""))


def test_hidden_partitions_are_looked_at(programs: Path, tmp_path: Path) -> None:
    """Measured: without -a only root sees them, while sbatch takes anybody's job for them."""
    put(programs, "scontrol", f'case "$*" in *-a*) exec cat {GOLDEN}/partition-22.05.txt;; esac')
    put(programs, "sinfo", f'case "$*" in *-a*) exec cat {GOLDEN}/sinfo-22.05.txt;; esac')
    assert [one.name for one in preflight.look()] == [one.name for one in partitions()]


@pytest.mark.parametrize(
    ("accounting", "standing"),
    [("RUNNING", "unknown"), ("PENDING", "unknown"), ("COMPLETED", "ended")],
)
def test_accounting_alone_keeps_no_job_alive(
    programs: Path, tmp_path: Path, accounting: str, standing: str
) -> None:
    """A job that the controller has lost stays RUNNING there for ever (runaway jobs)."""
    put(programs, "squeue", 'echo "{\\"jobs\\": [], \\"errors\\": []}"')
    put(programs, "sacct", f"echo '5|{accounting}|0:0|2026-11-24T16:07:50|n1|run'")
    put(
        programs,
        "scontrol",
        f'[ "$1" = ping ] && {UP} && exit; echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1',
    )
    (state,) = SlurmCluster().states(jobs(tmp_path, "5"))
    assert state.standing == standing


def test_a_follow_up_that_is_queued_meanwhile_is_asked_for(programs: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.jobs.mkdir(parents=True)
    put(programs, "scontrol", UP)
    put(
        programs,
        "squeue",
        f"echo 5 > {folder.jobs}/1.chain; exec cat {GOLDEN}/squeue-22.05.json",
    )
    (state,) = SlurmCluster().states(jobs(tmp_path, "6"))
    assert state.standing == "running"


def test_json_of_too_many_jobs_is_given_up(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_JSON_TIMEOUT_S", 0.3)
    put(programs, "scontrol", UP)
    put(
        programs,
        "squeue",
        f'case "$*" in *--json*) exec sleep 60;; esac\nexec cat {GOLDEN}/squeue-22.05.txt',
    )
    (state,) = SlurmCluster().states(jobs(tmp_path, "5"))
    assert state.standing == "running"


def test_files_that_a_network_disk_keeps_are_no_bad_nodes(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    plan.folder.bad_nodes.mkdir(parents=True)
    (plan.folder.bad_nodes / ".nfs0001").write_text("")
    assert command(plan) == ["sbatch", "--parsable", str(plan.script)]


@pytest.mark.parametrize("name", ["2.yaml", "2.chain", "2.tries"])
def test_no_submission_takes_over_the_files_of_another(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.jobs.mkdir(parents=True)
    (folder.jobs / name).write_text("")
    assert next_number(folder) == 3
