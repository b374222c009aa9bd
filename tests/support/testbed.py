"""A real Slurm cluster on one machine: munged, slurmctld and a slurmd a node, from Debian's packages.

Each node has a network, PID, UTS, IPC and mount namespace of its own, joined by a bridge, so that a node can be
powered off, a network cut and a daemon killed for real. Needs root and iproute2. It is up in about a second; the clocks
are short: a silent node is DOWN after about 15 s, a requeued job may start again after 6 s (cred_expire + 1).
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.ports import free_port

HERE = Path(__file__).parents[1] / "cluster"  # slurm.conf and node_init.sh
PACKAGES = "slurm-wlm slurm-client munge iproute2"
_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "unshare", "nsenter")
CPUS, GPUS = 8, 4


def why_not() -> str:
    """Why no cluster can be brought up here; empty where one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in _NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"missing {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}"
    probe = subprocess.run(
        ["unshare", "-n", "-u", "-i", "-m", "-p", "-f", "true"],
        check=False,
        capture_output=True,
        timeout=10,
    )
    return "" if probe.returncode == 0 else f"no namespaces: {probe.stderr.decode().strip()}"


class Testbed:
    """One cluster. `start` brings it up, `stop` ends every process and removes every trace of it."""

    __test__ = False

    def __init__(self, root: Path, *, tag: str, net: str, nodes: int = 4, grace_s: int = 8) -> None:
        self.root, self.tag, self.net, self.grace_s = root, tag, net, grace_s
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self._inits: dict[str, int] = {}  # pid 1 of each node's pid namespace, as seen from here
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def conf(self) -> Path:
        """slurm.conf: what SLURM_CONF names."""
        return self.root / "etc/slurm.conf"

    # -- the whole cluster ------------------------------------------------------------------------

    def start(self) -> None:
        """Bring everything up and wait until all nodes are idle."""
        self.stop()
        for name in ("etc", "munge", "state", "spool", "log", "run", "dev", "local", "nodes"):
            (self.root / name).mkdir(parents=True)
        (self.root / "munge").chmod(0o700)
        self._start_munge()
        self._start_network()
        self._write_config()
        self.start_controller("-c")
        for node in self.nodes:
            self.power_on(node)
        self.wait_idle()

    def stop(self) -> None:
        """End and remove all of it. Harmless where nothing runs."""
        for process in _processes_with(f"SLURM_CONF={self.conf}".encode(), str(self.root).encode()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        wait_for(
            lambda: (
                not _processes_with(f"SLURM_CONF={self.conf}".encode(), str(self.root).encode())
            ),
            20,
            "the old cluster's processes have ended",
        )
        while self._started:
            self._started.pop().wait(20)
        for line in _output("ip", "netns", "list").splitlines():
            if line.split()[0].startswith(f"{self.tag}-n"):
                _run("ip", "netns", "del", line.split()[0])
        for link in json.loads(_output("ip", "-json", "link") or "[]"):
            if link["ifname"].startswith((f"{self.tag}v", f"{self.tag}br")):
                subprocess.run(
                    ["ip", "link", "del", link["ifname"]],
                    check=False,
                    capture_output=True,
                    timeout=10,
                )
        shutil.rmtree(self.root, ignore_errors=True)
        self._inits.clear()

    def wait_idle(self, nodes: Sequence[str] | None = None, timeout_s: float = 60) -> None:
        """Until these nodes (default: all) are free for a job."""
        wanted = set(nodes or self.nodes)

        def idle() -> bool:
            lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").split("\n")
            return wanted <= {line.split()[0] for line in lines if line.endswith(" idle")}

        wait_for(idle, timeout_s, f"{sorted(wanted)} are idle")

    def run(self, *argv: str, timeout: float = 20) -> str:
        """A command beside the cluster (squeue, scontrol, ...); what it prints."""
        return _output(*argv, timeout=timeout, SLURM_CONF=str(self.conf))

    def mend(self) -> None:
        """All nodes up, idle and connected again, whatever a test has done to them."""
        if "is UP" not in self._ping():
            self.start_controller()
        for node in self.nodes:
            self.join_network(node)
            if node not in self._inits:
                self.power_on(node)
            elif not any(_comm(pid) == "slurmd" for pid in self.pids(node, "slurmd")):
                self.power_off(node)
                self.power_on(node)
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        for node in {line.split()[0] for line in lines if "drain" in line}:
            # A node that could not end a job's processes in time (cut off, say) is drained by Slurm.
            self.power_off(node)
            self.power_on(node)
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_idle()

    # -- the controller ---------------------------------------------------------------------------

    def start_controller(self, *options: str) -> None:
        """Start slurmctld; without -c it takes up the jobs that it had before."""
        script = (
            "hostname ctl; mount --bind $0/etc/hosts /etc/hosts; "
            'mount --bind $0/etc/nsswitch.conf /etc/nsswitch.conf; exec slurmctld -D "$@"'
        )
        self._spawn("ctl", "unshare", "-u", "-m", "bash", "-c", script, str(self.root), *options)
        wait_for(lambda: "is UP" in self._ping(), 20, "slurmctld answers")

    def kill_controller(self) -> None:
        """SIGKILL: the control machine is gone."""
        os.kill(int((self.root / "run/slurmctld.pid").read_text()), signal.SIGKILL)
        wait_for(lambda: "is UP" not in self._ping(), 20, "slurmctld is gone")

    def _ping(self) -> str:
        done = subprocess.run(
            ["scontrol", "ping"],
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
            env=self._env(),
        )
        return done.stdout

    # -- nodes ------------------------------------------------------------------------------------

    def power_on(self, node: str) -> None:
        """Boot a node: its namespaces and its slurmd."""
        netns = f"{self.tag}-{node}"
        outer = self._spawn(
            f"node.{node}",
            *("ip", "netns", "exec", netns, "unshare", "-u", "-i", "-m", "-p", "-f", "--kill-child=KILL"),
            *("bash", str(HERE / "node_init.sh"), str(self.root), node),
        )  # fmt: skip
        children = Path(f"/proc/{outer}/task/{outer}/children")
        wait_for(lambda: bool(children.read_text().split()), 10, f"{node} boots")
        self._inits[node] = int(children.read_text().split()[0])

    def power_off(self, node: str) -> None:
        """Everything on the node is gone at once: slurmd, steps, ranks."""
        os.kill(self._inits.pop(node), signal.SIGKILL)

    def kill_daemon(self, node: str) -> None:
        """SIGKILL to slurmd alone: Slurm loses the node, what runs there goes on."""
        init = self._inits[node]
        for pid in Path(f"/proc/{init}/task/{init}/children").read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmd":
                os.kill(int(pid), signal.SIGKILL)
                return
        raise AssertionError(f"no slurmd on {node}")

    def start_daemon(self, node: str) -> None:
        """A new slurmd on a node whose daemon was killed."""
        argv = ["nsenter", "-t", str(self._inits[node]), "-a", "setsid", "slurmd", "-N", node]
        subprocess.run(argv, check=True, env=self._env(), timeout=20, capture_output=True)

    def cut_network(self, node: str) -> None:
        """No packet to or from the node."""
        _run("ip", "link", "set", f"{self.tag}v{node[1:]}", "down")

    def join_network(self, node: str) -> None:
        """Packets travel again."""
        _run("ip", "link", "set", f"{self.tag}v{node[1:]}", "up")

    def on(self, node: str, *argv: str, timeout: float = 20) -> str:
        """Run a command on a node; what it prints."""
        return _output("nsenter", "-t", str(self._inits[node]), "-a", *argv, timeout=timeout)

    def pids(self, node: str, word: str) -> list[int]:
        """Processes of a node with this word on their command line, numbered as seen from here."""
        space = os.readlink(f"/proc/{self._inits[node]}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    argv = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if word in argv and os.readlink(entry / "ns/pid") == space:
                        found.append(int(entry.name))
        return sorted(found)

    # -- parts --------------------------------------------------------------------------------------

    def _env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LMSCALE_"))}
        path = f"{kept.get('PATH', '')}:/usr/sbin:/sbin"
        return {**kept, "PATH": path, "SLURM_CONF": str(self.conf)}

    def _spawn(self, log: str, *argv: str) -> int:
        with open(self.root / f"log/{log}.out", "ab") as out:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                env=self._env(),
            )  # fmt: skip
        self._started.append(process)
        return process.pid

    def _start_munge(self) -> None:
        key = self.root / "munge/munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        at = self.root / "munge"
        _run(
            "munged", "--force", f"--key-file={key}", f"--socket={at}/munge.sock", "--num-threads=2",
            f"--pid-file={at}/munged.pid", f"--log-file={at}/munged.log", f"--seed-file={at}/munged.seed",
        )  # fmt: skip

    def _start_network(self) -> None:
        _run("ip", "link", "add", f"{self.tag}br", "type", "bridge")
        _run("ip", "addr", "add", f"{self.net}.1/24", "dev", f"{self.tag}br")
        _run("ip", "link", "set", f"{self.tag}br", "up")
        hosts = ["127.0.0.1 localhost", f"{self.net}.1 ctl"]
        for number, node in enumerate(self.nodes, start=1):
            netns, veth, address = (
                f"{self.tag}-{node}",
                f"{self.tag}v{number}",
                f"{self.net}.{10 + number}",
            )
            _run("ip", "netns", "add", netns)
            _run("ip", "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", netns)
            _run("ip", "link", "set", veth, "master", f"{self.tag}br", "up")
            _run("ip", "-n", netns, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", netns, "link", "set", "eth0", "up")
            _run("ip", "-n", netns, "link", "set", "lo", "up")
            _run("ip", "-n", netns, "route", "add", "default", "via", f"{self.net}.1")
            hosts.append(f"{address} {node}")
        (self.root / "etc/hosts").write_text("\n".join(hosts) + "\n")

    def _write_config(self) -> None:
        etc, last = self.root / "etc", len(self.nodes)
        values = {"ROOT": self.root, "NET": self.net, "LAST": last, "LAST_ADDRESS": 10 + last}
        values |= {"CPUS": CPUS, "GPUS": GPUS, "GRACE": self.grace_s, "PORT": free_port()}
        text = (HERE / "slurm.conf").read_text()
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        self.conf.write_text(text)
        for number in range(GPUS):  # slurmd wants a character device; nothing opens it
            os.mknod(self.root / f"dev/nvidia{number}", 0o20600, os.makedev(195, number))
        gres = (
            f"NodeName=n[1-{last}] Name=gpu Type=h100 File={self.root}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        (etc / "gres.conf").write_text(gres)
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (etc / "plugstack.conf").write_text("")
        # A name that is not in the hosts file must not wait 10 s for a name server out of reach.
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "resolv.conf").write_text("")


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until true; AssertionError with `what` when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}"
        time.sleep(0.1)


def _processes_with(variable: bytes, word: bytes) -> list[int]:
    """Processes with a variable in their environment or a word on their command line; not this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    continue
                env = (entry / "environ").read_bytes().split(b"\0")
                daemon = (entry / "comm").read_text().strip() in (
                    "munged",
                    "slurmctld",
                    "slurmd",
                    "slurmstepd",
                )
                if variable in env or (daemon and word in (entry / "cmdline").read_bytes()):
                    found.append(int(entry.name))
    return found


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"


def _output(*argv: str, timeout: float = 20, **env: str) -> str:
    done = subprocess.run(
        argv,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done.stdout
