"""Who else may come to the meeting of supervisors, and in which order: strangers, requests, the same node twice."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import lmscale
from lmscale_launcher.supervisor.event_loop import EventLoop
from lmscale_launcher.supervisor.protocol import SILENT_S, Channel, loss_reason
from lmscale_launcher.supervisor.rendezvous import PORTS
from tests.support.ports import free_port
from tests.support.stand_ins import Nodes, Start, clean_env, kind, until, watched


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    yield from watched(tmp_path)


class Visitor:
    """A connection to node 0, and what is said over it by hand."""

    def __init__(self, nodes: Nodes) -> None:
        host, _, port = nodes.master.rpartition(":")
        self.socket = socket.socket()
        until(lambda: self.socket.connect_ex((host, int(port))) in (0, 106), "node 0 listens")
        self.socket.settimeout(10)
        self._lines = self.socket.makefile("rb")

    def greet(self, node: int, nodes: int, **more: Any) -> "Visitor":
        words = {"start": "job-1", "node": node, "nodes": nodes, "ranks": 2, "host": f"n{node}",
                 "lmscale": lmscale.__version__, "python": platform.python_version(),
                 "clock": time.time(), "unhealthy": []}  # fmt: skip
        return self.say("greet", **{**words, **more})

    def say(self, kind: str, **fields: Any) -> "Visitor":
        self.socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        return self

    def hear(self, last: str) -> list[str]:
        """What kinds of things are said, up to this one."""
        found: list[str] = []
        while last not in found:
            found.append(json.loads(self._lines.readline())["kind"])
        return [one for one in found if one != "beat"]

    def close(self) -> None:
        self._lines.close()
        self.socket.close()

    def __enter__(self) -> "Visitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def frozen(start: Start) -> Iterator[Nodes]:
    """Three nodes, of which node 0 listens but has been stopped: what comes meanwhile comes at once."""
    nodes = Nodes(start, "mark('ran', 1)", count=3).launch(0)
    Visitor(nodes).close()
    os.kill(nodes.pid(0), signal.SIGSTOP)
    yield nodes
    nodes.processes[0].kill()
    nodes.processes[0].communicate()


def test_strangers_do_not_end_the_meeting(start: Start) -> None:
    nodes = Nodes(start, "pass").launch(0)
    words = [b"[" * 200_000 + b"]" * 200_000 + b"\n", b'{"kind"', b"\0\xff\xfe\n", b"7\n", b"{}\n", b"\n",
             b'{"kind": "greet", "start": "job-1", "node": 7}\n', b"x" * 3_000_000]  # fmt: skip
    with ExitStack() as stack:
        for text in words:
            stack.enter_context(Visitor(nodes)).socket.sendall(text)
        codes, said = nodes.launch(1).end()
    assert codes == [0, 0], said


def test_a_request_that_comes_with_the_last_node_is_heard(start: Start, frozen: Nodes) -> None:
    with Visitor(frozen) as first, Visitor(frozen) as last:
        first.greet(1, 3).say("stop", number=int(signal.SIGUSR2))
        last.greet(2, 3)
        os.kill(frozen.pid(0), signal.SIGCONT)
        assert first.hear("leave") == last.hear("leave") == ["welcome", "leave"]
    codes, words = frozen.end()
    assert codes == [85], words
    assert not start.marks("ran") and start.kinds() == ["start", "exit"]


def test_a_request_during_the_meeting_loses_no_node(start: Start) -> None:
    nodes = Nodes(start, "pass").launch(0)
    Visitor(nodes).close()
    os.kill(nodes.pid(0), signal.SIGTERM)
    codes, said = nodes.end()
    assert codes == [85] and "stopped on request" in said[0]
    assert start.kinds() == ["start", "exit"]


def test_a_node_that_comes_again_is_not_refused(frozen: Nodes) -> None:
    Visitor(frozen).greet(1, 3).close()  # it has waited too long for an answer
    with Visitor(frozen) as again, Visitor(frozen) as other, Visitor(frozen) as last:
        again.greet(1, 3)
        other.greet(1, 3, host="elsewhere")  # two nodes of one number
        os.kill(frozen.pid(0), signal.SIGCONT)
        assert other.hear("stranger") == ["stranger"]
        last.greet(2, 3)
        for node in (again, last):
            assert node.hear("go") == ["welcome", "go"]
            node.say("ended", codes={})
        assert again.hear("leave") == last.hear("leave") == ["leave"]
    codes, words = frozen.end()
    assert codes == [0], words


def test_a_signal_is_heard_while_a_stranger_keeps_a_node_waiting(start: Start) -> None:
    nodes = Nodes(start, "pass", count=2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", int(nodes.master.rpartition(":")[2])))
        silent.listen()
        nodes.launch(1)
        there, _ = silent.accept()
        with there:
            assert there.recv(10)  # it has greeted and waits
            os.kill(nodes.pid(1), signal.SIGTERM)
            codes, said = nodes.end(timeout=12)
    assert codes == [85], said


def test_a_mistake_in_the_run_is_none_to_try_again_though_no_port_is_free(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: nonsense\n")
    env = {"NODES": "2", "NODE_RANK": "0", "START": "job-1"}
    with ExitStack() as stack:
        while True:
            first = free_port()
            try:
                for port in range(first, first + PORTS):
                    stack.enter_context(socket.create_server(("", port)))
                break
            except OSError:
                stack.close()
        env["MASTER"] = f"127.0.0.1:{first}"
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lmscale", "train", "run.yaml", "--nproc", "1"],
            cwd=tmp_path, timeout=30, capture_output=True, text=True, check=False,
            env=clean_env(**{f"LMSCALE_{name}": text for name, text in env.items()}),
        )  # fmt: skip
    assert done.returncode == 78, done.stderr
    assert "nonsense" in done.stderr


def test_silence_of_a_host_that_answers_is_borne_for_longer_than_a_file_server_needs() -> None:
    ours, theirs = socket.socketpair()
    with EventLoop() as loop, theirs:
        channel = Channel(ours, loop)
        loop.awake_s += 60
        assert not loss_reason(channel)
        loop.awake_s += SILENT_S - 59
        assert "no message has arrived for 121 s" in loss_reason(channel)
        theirs.sendall(b'{"kind": "beat"}\n')
        loop.turn(1)
        assert not loss_reason(channel)
        channel.close()
        assert loss_reason(channel) == "its connection is closed"


def test_an_end_is_told_though_the_rank_was_about_to_be_examined(start: Start) -> None:
    """The rank that holds all up ends by itself, at the moment when it is asked for its stack."""
    root = str(Path(__file__).parents[3])
    body = f"""
    sys.path.insert(0, {root!r})
    from lmscale.run_folder.rank_progress import RankProgress
    pulse = RankProgress.inherited(os.environ)
    signal.signal(signal.SIGQUIT, lambda *_: os._exit(65))
    for step in (1, 2, 3):
        pulse.tick("data", step), pulse.tick("step")
    wait()
    """
    code, said = start.to_the_end(body, ranks=1, stall_limits=[0.5])
    assert code == 65, said
    assert [(one["rank"], one["code"]) for one in kind(start, "died")] == [(0, 65)]
