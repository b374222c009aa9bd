"""Process identity, children, death signals, interfaces."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmscale.base import proc
from lmscale.base.proc import ProcessIdentity, children, death_signal, is_alive, started_ticks


def test_a_process_is_known_by_pid_and_start() -> None:
    me = ProcessIdentity.of()
    assert me.pid == os.getpid()
    assert me.alive
    assert is_alive(me.pid, None)
    assert not is_alive(me.pid, (me.ticks or 0) + 1)
    child = subprocess.Popen(["sleep", "60"])
    identity = ProcessIdentity.of(child.pid)
    assert identity.alive
    assert children() >= {child.pid}
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert proc.process_state(child.pid) == "T"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not identity.alive  # a zombie
    child.wait()
    assert not identity.alive
    assert proc.process_state(child.pid) == ""


def test_without_proc_psutil_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "_stat_fields", lambda pid: None)
    monkeypatch.setattr(proc, "_PROC", Path("/nonexistent"))
    child = subprocess.Popen(["sleep", "60"])
    first = started_ticks(child.pid)
    assert first is not None
    assert started_ticks(child.pid) == first
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert started_ticks(child.pid) is None
    child.wait()
    assert started_ticks(child.pid) is None


_PARENT = """
import os, subprocess, sys, time
from lmscale.base.proc import death_signal
child = subprocess.Popen(["sleep", "60"], preexec_fn=death_signal(os.getpid()))
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        identity = ProcessIdentity.of(child)
        assert identity.alive
        parent.kill()
        parent.wait()
    until = time.monotonic() + 10
    while identity.alive and time.monotonic() < until:
        time.sleep(0.01)
    assert not identity.alive


def test_a_child_whose_parent_is_gone_already_exits() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        subprocess.run(["true"], preexec_fn=death_signal(1, exit_code=7), check=True)
    assert caught.value.returncode == 7


def test_interfaces_are_up_and_not_the_loopback() -> None:
    found = proc.interfaces()
    assert "lo" not in found
    assert all(address.count(".") == 3 for own in found.values() for address in own)


def test_psutil_is_not_imported_on_linux() -> None:
    code = (
        "import sys; from lmscale.base import proc; proc.ProcessIdentity.of().alive; proc.children();"
        "assert 'psutil' not in sys.modules"
    )
    if Path("/proc/self/task").exists():
        subprocess.run([sys.executable, "-c", code], check=True)
