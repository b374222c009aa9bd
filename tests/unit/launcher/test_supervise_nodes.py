"""Supervisors of several nodes, all on this host, with stand-in ranks: they meet, agree and part."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmscale.run_folder.paths import RunFolder
from tests.support.ports import free_port
from tests.support.stand_ins import (
    ROOT,
    Nodes,
    Start,
    alive,
    clean_env,
    kind,
    mentioning,
    until,
    watched,
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    yield from watched(tmp_path)


def test_nodes_meet_and_their_ranks_form_one_world(start: Start) -> None:
    body = "mark('env', json.dumps(dict(os.environ))); print(f'hello from {rank}')"
    codes, said = Nodes(start, body, count=3).launch().end()
    assert codes == [0, 0, 0], said
    envs = [json.loads(text) for _, text in sorted(start.marks("env").items())]
    assert [env["RANK"] for env in envs] == [str(rank) for rank in range(6)]
    assert [env["LOCAL_RANK"] for env in envs] == ["0", "1"] * 3
    shared = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LMSCALE_START")
    assert len({tuple(env[name] for name in shared) for env in envs}) == 1
    assert (envs[0]["MASTER_ADDR"], envs[0]["WORLD_SIZE"]) == ("127.0.0.1", "6")
    assert sorted(said[1].splitlines()) == ["[n1:2] hello from 2", "[n1:3] hello from 3"]
    assert sorted(said[0].splitlines()) == ["[n0:0] hello from 0", "[n0:1] hello from 1"]
    (begun,) = kind(start, "start")
    assert (begun["nodes"], begun["ranks"], begun["fresh"]) == (["n0", "n1", "n2"], 6, False)
    assert start.kinds() == ["start", "exit"]  # node 0 alone writes them
    assert start.events()[-1]["codes"] == {str(rank): 0 for rank in range(6)}
    assert (start.run / "logs" / "job-1-rank-5.log").read_text() == "hello from 5\n"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_who_comes_first_waits_for_the_other(start: Start, order: tuple[int, int]) -> None:
    nodes = Nodes(start, "pass")
    nodes.launch(order[0])
    time.sleep(0.7)
    codes, said = nodes.launch(order[1]).end()
    assert codes == [0, 0], said


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(78 if rank == 3 else 75)", 78),
        ("sys.exit(87 if rank == 2 else 1)", 87),
        ("sys.exit(65) if rank == 0 else wait()", 65),
        ("sys.exit(85)", 85),
        ("wait(0.5 * rank); sys.exit(0)", 0),
        ("os.kill(os.getpid(), 9) if rank == 3 else wait()", 137),
    ],
)
def test_all_nodes_leave_with_the_decisive_code(start: Start, body: str, code: int) -> None:
    codes, said = Nodes(start, body).launch().end()
    assert codes == [code, code], said
    assert start.kinds() == ["start", "exit"]
    assert start.events()[-1]["code"] == code


def test_a_rank_that_dies_on_another_node_is_named_and_all_start_again(start: Start) -> None:
    body = """
    mark("pid", os.getpid())
    mark(os.environ["LMSCALE_START"], os.environ["MASTER_PORT"])
    if os.environ["LMSCALE_START"] == "job-1":
        wait()
    """
    nodes = Nodes(start, body, max_restarts=2).launch()
    pids = start.wait_for("pid", 4)
    os.kill(int(pids[3]), signal.SIGKILL)
    codes, said = nodes.end()
    assert codes == [0, 0], said
    assert "rank 3 on n1 (node 1) has ended (died by SIGKILL, 137): ending the others" in said[0]
    (died,) = kind(start, "died")
    assert (died["rank"], died["node"], died["number"], died["code"]) == (3, "n1", 1, 137)
    assert len(set(start.marks("job-1.1").values())) == 1 and len(start.marks("job-1.1")) == 4
    assert start.kinds() == ["start", "restart", "start", "exit"]
    assert not alive([int(pid) for pid in pids.values()])


def test_a_lost_node_ends_the_others_with_75(start: Start) -> None:
    body = "mark('pid', os.getpid()); wait()"
    nodes = Nodes(start, body, count=3, max_restarts=5).launch()
    pids = start.wait_for("pid", 6)
    os.kill(nodes.pid(1), signal.SIGKILL)
    codes, said = nodes.end()
    assert codes == [75, -9, 75], said
    assert "node 1 (n1) is lost" in said[0]
    assert [event["node"] for event in kind(start, "lost_node")] == ["n1"]
    assert start.kinds()[-1] == "exit" and start.events()[-1]["code"] == 75
    until(lambda: not alive([int(pid) for pid in pids.values()]), "all ranks have ended")


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_node_that_the_ranks_name_is_not_started_on_again(start: Start, by_hand: bool) -> None:
    body = """
    bad = run / "bad-nodes"
    if rank == 0 and not (bad / "n1").exists():
        bad.mkdir()
        (bad / "n1").write_text("its weights drifted")
        sys.exit(75)
    wait(0.5)
    """
    codes, said = Nodes(start, body, max_restarts=5, by_hand=by_hand).launch().end()
    if by_hand:  # nobody would start it elsewhere
        assert codes == [0, 0], said
        assert start.kinds() == ["start", "restart", "start", "exit"]
    else:
        assert codes == [75, 75], said
        assert "n1: marked bad in" in said[0] and "All nodes exit" in said[0]
        assert start.kinds() == ["start", "exit"]


def test_without_node_0_the_others_end_with_75(start: Start) -> None:
    nodes = Nodes(start, "mark('pid', os.getpid()); wait()", count=3, max_restarts=5).launch()
    pids = start.wait_for("pid", 6)
    os.kill(nodes.pid(0), signal.SIGKILL)
    codes, said = nodes.end()
    assert codes == [-9, 75, 75], said
    assert "node 0 is lost: its connection is closed" in said[1]
    until(lambda: not alive([int(pid) for pid in pids.values()]), "all ranks have ended")
    assert start.kinds() == ["start"]  # whoever is left does not write


STOPPABLE = """
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: got.append(number))
mark("ready", 1)
while not got:
    time.sleep(0.01)
time.sleep(0.3)
mark("got", got)
sys.exit(85)
"""


@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)])
def test_a_signal_on_any_node_reaches_each_rank_once(start: Start, who: tuple[int, ...]) -> None:
    nodes = Nodes(start, STOPPABLE, max_restarts=5).launch()
    start.wait_for("ready", 4)
    for node in who:  # srun gives it to all of them
        os.kill(nodes.pid(node), signal.SIGUSR2)
    codes, said = nodes.end()
    assert codes == [85, 85], said
    assert start.marks("got") == dict.fromkeys(range(4), "[12]")


def test_the_stop_file_and_the_deadline_reach_all_nodes(start: Start) -> None:
    nodes = Nodes(start, STOPPABLE, max_restarts=5).launch()
    start.wait_for("ready", 4)
    RunFolder(start.run).stop.write_text("enough\n")
    codes, said = nodes.end()
    assert codes == [85, 85], said
    again, said = Nodes(start, STOPPABLE, start="job-2").launch().end()
    assert again == [0, 0] and "stopped by enough" in said[0]
    RunFolder(start.run).stop.unlink()
    for path in (start.run / "marks").iterdir():
        path.unlink()
    now = time.time()
    codes, said = Nodes(start, STOPPABLE, start="job-3", deadline=now + 2).launch().end()
    assert codes == [85, 85] and "nearly over" in said[0], said
    assert start.marks("got") == dict.fromkeys(range(4), "[15]")


def test_a_signal_while_waiting_for_a_restart_ends_it_on_all_nodes(start: Start) -> None:
    nodes = Nodes(
        start, "mark('ran', 1); sys.exit(75)", max_restarts=3, restart_delay_s=30.0
    ).launch()
    until(lambda: "restart" in start.kinds(), "a restart is planned")
    os.kill(nodes.pid(1), signal.SIGTERM)
    codes, said = nodes.end()
    assert codes == [75, 75], said
    assert start.kinds()[-1] == "exit"


def test_ports_in_use_are_passed_over_and_strangers_are_sent_away(start: Start) -> None:
    """A program that says nothing, one that talks, and another job's supervisors, on neighbouring ports."""
    other = Nodes(start, "pass", start="other")
    nodes = Nodes(start, "pass")
    with socket.socket() as silent, socket.socket() as lost:
        silent.bind(("", free_port()))  # first, so that no other test can take it meanwhile
        silent.listen()
        port = silent.getsockname()[1]
        nodes.master, other.master = f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"
        other.launch(0)
        taken = port + 1
        until(lambda: lost.connect_ex(("127.0.0.1", taken)) == 0, "the other job listens")
        lost.sendall(b"GET / HTTP/1.1\r\n\r\n")
        codes, said = nodes.launch().end(timeout=40)
    assert codes == [0, 0], said
    other.launch(1)
    codes, said = other.end()
    assert codes == [0, 0], said


def test_ranks_of_all_nodes_reach_rank_0_before_it_listens(start: Start) -> None:
    body = """
    import socket
    port = os.environ["MASTER_PORT"]
    if rank == 0:
        time.sleep(0.5)
        with socket.socket(fileno=int(os.environ["LMSCALE_RENDEZVOUS_FD"])) as here:
            for _ in range(3):
                here.accept()[0].close()
    else:
        assert "LMSCALE_RENDEZVOUS_FD" not in os.environ
        assert socket.create_connection(("127.0.0.1", int(port))).recv(1) == b""
    """
    codes, said = Nodes(start, body).launch().end()
    assert codes == [0, 0], said
    assert start.kinds() == ["start", "exit"]


def test_nodes_that_do_not_come_are_named(start: Start) -> None:
    codes, said = Nodes(start, "pass", count=4, rendezvous_timeout_s=1.5).launch(0, 2).end()
    assert codes == [75, 75], said
    assert "node 1, 3 of 4 did not connect to 127.0.0.1:" in said[0]
    assert [event["number"] for event in kind(start, "lost_node")] == [1, 3]
    assert start.kinds() == ["start", "lost_node", "lost_node", "exit"]
    codes, said = Nodes(start, "pass", rendezvous_timeout_s=1.5).launch(1).end()
    assert codes == [75] and "node 0 was not found at 127.0.0.1" in said[1]


def test_nodes_that_differ_are_refused(start: Start) -> None:
    nodes = Nodes(start, "mark('ran', 1)").launch(0)
    codes, said = nodes.launch(1, version="9.9").end()
    assert codes == [78, 78], said
    assert "node 1 (n1) runs lmscale 9.9, node 0 (n0)" in said[0] + said[1]
    codes, said = Nodes(start, "mark('ran', 1)", start="b").launch(0).launch(1, ranks=3).end()
    assert codes == [78, 78] and "cluster.ranks_per_node" in said[0], said
    assert not start.marks("ran")


def test_an_unfit_node_is_written_down_and_nothing_starts(start: Start) -> None:
    nodes = Nodes(start, "mark('ran', 1)", max_restarts=5).launch(0)
    codes, said = nodes.launch(1, unhealthy=["GPUs: one is lost; drain it", "disk: full"]).end()
    assert codes == [75, 75], said
    assert "n1: GPUs: one is lost" in said[0]
    assert (
        start.run / "bad-nodes" / "n1"
    ).read_text() == "GPUs: one is lost; drain it\ndisk: full\n"
    assert [event["node"] for event in kind(start, "bad_node")] == ["n1"]
    assert not start.marks("ran")


def test_every_node_stages_before_any_rank_starts(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(
        "import os, sys, time, pathlib\n"
        "node = os.environ['SLURMD_NODENAME']\n"
        "time.sleep(0.5 if node == 'n1' else 0)\n"
        "assert 'RANK' not in os.environ\n"
        f"count = len(list(pathlib.Path({str(start.run)!r}).glob('staged-*')))\n"
        f"pathlib.Path({str(start.run)!r}, f'staged-{{node}}').touch()\n"
        "print('staged', os.environ['LMSCALE_START'])\n"
        f"sys.exit(75 if pathlib.Path({str(tmp_path)!r}, 'broken').exists() else 0)\n"
    )
    stage = [sys.executable, "-S", str(script)]
    body = "mark('saw', len(list(run.glob('staged-*'))))"
    codes, said = Nodes(start, body, stage=stage).launch().end()
    assert codes == [0, 0], said
    assert set(start.marks("saw").values()) == {"2"} and len(start.marks("saw")) == 4
    assert "[n1:2] staged job-1" in said[1]
    (tmp_path / "broken").touch()
    codes, said = Nodes(start, "mark('ran', 1)", stage=stage, start="b").launch().end()
    assert codes == [75, 75] and not start.marks("ran"), said


def test_a_supervisor_killed_with_its_ranks_children_leaves_nothing(start: Start) -> None:
    body = """
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)", str(run)])
    mark("pid", os.getpid())
    wait()
    """
    nodes = Nodes(start, body).launch()
    start.wait_for("pid", 4)
    os.kill(nodes.pid(1), signal.SIGKILL)
    nodes.end()
    until(lambda: not mentioning(start.run), "nothing is left")


def test_the_address_of_a_name_is_not_needed_on_one_node(start: Start) -> None:
    done = subprocess.run(
        start.options("mark('m', os.environ['MASTER_ADDR'])", nodes={"master": "no.such.host:1"}),
        cwd=ROOT, env=clean_env(), timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert start.marks("m") == {0: "127.0.0.1", 1: "127.0.0.1"}


RUN = """
model: {num_layers: 1, hidden_size: 32, num_heads: 2, ffn_hidden_size: 64}
data: {corpora: [{path: corpus}]}
optim: {lr: 0.001}
train: {steps: 4, global_batch_size: 8, micro_batch_size: 2, seq_len: 32, run_dir: run}
"""


def by_command_line(folder: Path, *argv: str, timeout: float = 30) -> list[tuple[int, str]]:
    """`lmscale train` on two nodes; each sees its own folder of run files, as without a shared file system."""
    master = f"127.0.0.1:{free_port()}"
    both = []
    for node in (0, 1):
        env = clean_env(
            LMSCALE_NODES="2", LMSCALE_NODE_RANK=str(node), LMSCALE_MASTER=master,
            LMSCALE_START="job-1", SLURMD_NODENAME=f"n{node}",
        )  # fmt: skip
        words = [
            sys.executable,
            "-P",
            "-m",
            "lmscale",
            "train",
            f"run-{node}.yaml",
            *argv,
        ]
        both.append(
            subprocess.Popen(
                [*words, "cluster.nodes=2", "--nproc", "2"], cwd=folder, env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=timeout)[0] for process in both]
    return [(process.returncode, words) for process, words in zip(both, said, strict=True)]


def test_a_node_that_cannot_read_the_run_file_is_the_bad_one(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "run-0.yaml").write_text(RUN)
    (code, said), (code_1, said_1) = by_command_line(tmp_path)
    assert (code, code_1) == (75, 75), said + said_1
    assert "n1: " in said and "run-1.yaml" in said
    assert "run-1.yaml" in (tmp_path / "run" / "bad-nodes" / "n1").read_text()


def test_what_is_wrong_on_node_0_is_wrong_with_the_run(tmp_path: Path) -> None:
    for name in ("run-0.yaml", "run-1.yaml"):
        (tmp_path / name).write_text(RUN)
    (code, said), (code_1, _) = by_command_line(tmp_path)
    assert (code, code_1) == (78, 78), said
    assert "corpus does not exist" in said and "lmscale prepare" in said
