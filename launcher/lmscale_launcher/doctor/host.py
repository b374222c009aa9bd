"""Whether somebody keeps this host's clock right.

This host: its cores, memory, limits, shared memory, name and interfaces.
"""

import os
import resource
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from lmscale.base import proc
from lmscale.base.units import show_bytes
from lmscale_launcher.doctor.command_result import CommandResult, Question, run_command
from lmscale_launcher.doctor.findings import Finding, fail, ok, warn
from lmscale_launcher.gpus import count_cores


def keeper() -> Finding:
    """What systemd or chrony say; containers have neither, and take their host's clock."""
    hint = "start chrony or systemd-timesyncd: several nodes must agree to a few seconds"
    said = run_command(["timedatectl", "show", "-p", "NTPSynchronized", "--value"], timeout_s=5.0)
    if said.good and said.out.strip() in {"yes", "no"}:
        if said.out.strip() == "yes":
            return ok("time service", "the clock is synchronized")
        return warn("time service", "the clock is not synchronized", hint)
    said = run_command(["chronyc", "-c", "tracking"], timeout_s=5.0)
    fields = said.out.strip().split(",")
    if said.good and len(fields) > 4:
        fact = f"chrony is {float(fields[4]):+.4f} s off its source"
        if fields[2] != "0":
            return ok("time service", fact)
        return warn("time service", "chrony has no source", hint)
    return ok("time service", "not known here (neither systemd nor chrony answers)")


SHM = Path("/dev/shm")
_RDMA = Path("/sys/class/infiniband")
_NET = Path("/sys/class/net")
_CONTAINER_BRIDGES = ("docker", "veth", "virbr", "br-", "cni")


def open_files() -> Finding:
    """The limit that shards, sockets of a full mesh and logs share."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    fact = f"{soft} a process (at most {most})"
    hint = "ulimit -n 65536 in your profile, or LimitNOFILE of slurmd"
    if soft != resource.RLIM_INFINITY and soft < 256:
        return fail("open files", fact, hint)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return warn("open files", fact, hint)
    return ok("open files", fact)


def locked_memory(*, rdma: Path = _RDMA) -> Finding | None:
    """The limit that RDMA needs lifted; None on a host without it."""
    if not rdma.is_dir() or not any(rdma.iterdir()):
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "unlimited, as RDMA needs it")
    hint = "ulimit -l unlimited; under Slurm LimitMEMLOCK=infinity of slurmd: NCCL fails without it"
    return warn("locked memory", f"{show_bytes(soft)} a process beside RDMA hardware", hint)


def cores(ranks: int) -> Finding:
    """Cores for the ranks: one each at least."""
    mine, all_cores = count_cores(), os.cpu_count() or 1
    fact = f"{mine} of {all_cores} may be used" + (f", {ranks} rank(s)" if ranks else "")
    if mine < ranks:
        hint = (
            "ask for more (cluster.slurm.cpus_per_task; srun does not take it over from sbatch), "
            "or lift the container's quota"
        )
        return warn("cores", fact, hint)
    return ok("cores", fact)


def shared_memory(ranks: int, *, gpus: bool, shm: Path = SHM) -> Finding:
    """/dev/shm, through which NCCL's ranks of one host talk; the CPU path does without."""
    need = 32 * ranks << 20  # what NCCL maps for the channels of one rank, and some room
    try:
        usage = shutil.disk_usage(shm)
        allowed = os.access(shm, os.W_OK)
    except OSError as error:
        fact = f"{shm}: {error.strerror}"
        hint = "mount a tmpfs there"
        return fail("shared memory", fact, hint) if gpus else warn("shared memory", fact, hint)
    fact = f"{shm}: {show_bytes(usage.free)} of {show_bytes(usage.total)} free"
    fact += "" if allowed else ", not writable"
    if usage.free >= need and allowed:
        return ok("shared memory", fact)
    hint = f"{show_bytes(need)} are wanted: remove leftovers, or enlarge it (docker --shm-size=8g)"
    return fail("shared memory", fact, hint) if gpus else warn("shared memory", fact, hint)


def leftovers(*, shm: Path = SHM) -> Finding | None:
    """Files of this user in /dev/shm that no process has open; None where there are none."""
    left = unused(shm)
    if not left:
        return None
    size = show_bytes(sum(left.values()))
    names = " ".join(str(path) for path in sorted(left)[:3]) + (" ..." if len(left) > 3 else "")
    fact = f"{len(left)} file(s), {size}, that no process of yours has open: {names}"
    return warn("shared memory", fact, "left by jobs that were killed? Then remove them with rm")


def unused(shm: Path) -> dict[Path, int]:
    """Such files, with their size."""
    try:
        sizes = {
            Path(entry.path): entry.stat().st_size
            for entry in os.scandir(shm)
            if entry.is_file(follow_symlinks=False) and entry.stat().st_uid == os.getuid()
        }
    except OSError:  # no such folder, or one that changed meanwhile
        return {}
    used = _in_use(shm) if sizes else set()
    return {path: size for path, size in sizes.items() if str(path) not in used}


def _in_use(shm: Path) -> set[str]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text(errors="replace")
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # gone, or somebody else's
            continue
        found |= {line[line.index(str(shm)) :] for line in maps.splitlines() if str(shm) in line}
        found |= {link for link in links if link.startswith(str(shm))}
    return found


def start_name_lookup() -> Question:
    """Ask for the addresses of this host's name. A dead name server costs 10 s and more."""
    return Question(["getent", "ahostsv4", socket.gethostname()], timeout_s=2.0)


def host_name(answer: CommandResult, env: Mapping[str, str], *, several: bool) -> Finding:
    """Whether other hosts can reach what this host's name means; gloo listens there by default."""
    name = socket.gethostname()
    wanted = env.get("GLOO_SOCKET_IFNAME", "")
    if answer.state == "missing":
        return ok("host name", f"{name} (no getent here to look it up)")
    if answer.state == "hung":
        hint = "put this host into /etc/hosts: every start of ranks waits for this answer"
        return warn("host name", f"{name}: {answer.words} of the name service", hint)
    addresses = list(
        dict.fromkeys(line.split()[0] for line in answer.out.splitlines() if line.strip())
    )
    shown = ", ".join(addresses) or "no address"
    outside = [address for address in addresses if not address.startswith("127.")]
    if outside or (wanted and not interface_problem(wanted)):
        return ok("host name", f"{name} is {shown}" + (f"; gloo uses {wanted}" if wanted else ""))
    reach = ", ".join(f"{one} ({address})" for one, address in interfaces().items()) or "none is up"
    first = next(iter(interfaces()), "eth0")
    hint = f"for several nodes set cluster.env.GLOO_SOCKET_IFNAME: {first} (interfaces: {reach})"
    fact = f"{name} is {shown}, which no other host can reach"
    return (
        warn("host name", fact, hint) if several or not addresses else ok("host name", fact, hint)
    )


def interface_problem(name: str, *, net: Path = _NET) -> str:
    """What is wrong with a value of GLOO_SOCKET_IFNAME; empty if nothing."""
    if "," in name or name.startswith(("^", "=")):
        return f"{name!r} is a list or a pattern; gloo takes one name"
    if not (net / name).exists():
        return f"there is no interface {name!r}"
    return ""


def interfaces() -> dict[str, str]:
    """Interfaces that are up, with their IPv4 address; without the loopback and bridges of containers."""
    return {
        name: addresses[0]
        for name, addresses in sorted(proc.interfaces().items())
        if not name.startswith(_CONTAINER_BRIDGES)
    }
