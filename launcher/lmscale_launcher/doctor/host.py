"""Checks of this host: time service, cores, limits, shared memory, name and interfaces."""

import os
import resource
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from lmscale.base import proc
from lmscale.base.units import show_bytes
from lmscale_launcher.doctor.command_result import CommandResult, RunningCommand, run_command
from lmscale_launcher.doctor.findings import Finding, fail, ok, warn
from lmscale_launcher.gpus import count_cores

SHM = Path("/dev/shm")
_RDMA = Path("/sys/class/infiniband")
_NET = Path("/sys/class/net")
_CONTAINER_BRIDGES = ("docker", "veth", "virbr", "br-", "cni")


def time_service() -> Finding:
    """Whether systemd or chrony synchronizes the clock; containers have neither and use their host's clock."""
    hint = (
        "start chrony or systemd-timesyncd: the clocks of all nodes must agree within a few seconds"
    )
    result = run_command(["timedatectl", "show", "-p", "NTPSynchronized", "--value"], timeout_s=5.0)
    if result.succeeded and result.out.strip() in {"yes", "no"}:
        if result.out.strip() == "yes":
            return ok("time service", "the clock is synchronized")
        return warn("time service", "the clock is not synchronized", hint)
    result = run_command(["chronyc", "-c", "tracking"], timeout_s=5.0)
    fields = result.out.strip().split(",")
    if result.succeeded and len(fields) > 4:
        fact = f"chrony is {float(fields[4]):+.4f} s off its source"
        if fields[2] != "0":
            return ok("time service", fact)
        return warn("time service", "chrony has no source", hint)
    return ok("time service", "unknown (neither timedatectl nor chronyc is available)")


def open_files() -> Finding:
    """The limit of open files: shards, sockets of a full mesh and logs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    maximum = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    fact = f"{soft} per process (at most {maximum})"
    hint = "ulimit -n 65536 in your profile, or LimitNOFILE of slurmd"
    if soft != resource.RLIM_INFINITY and soft < 256:
        return fail("open files", fact, hint)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return warn("open files", fact, hint)
    return ok("open files", fact)


def locked_memory(*, rdma: Path = _RDMA) -> Finding | None:
    """The limit of locked memory, which RDMA needs unlimited; None on a host without RDMA."""
    if not rdma.is_dir() or not any(rdma.iterdir()):
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "unlimited, as RDMA requires")
    hint = "ulimit -l unlimited; under Slurm LimitMEMLOCK=infinity of slurmd: NCCL fails without it"
    return warn(
        "locked memory", f"{show_bytes(soft)} per process on a host with RDMA hardware", hint
    )


def cores(ranks: int) -> Finding:
    """Cores for the ranks: at least one per rank."""
    usable, all_cores = count_cores(), os.cpu_count() or 1
    fact = f"{usable} of {all_cores} may be used" + (f", {ranks} rank(s)" if ranks else "")
    if usable < ranks:
        hint = (
            "request more (cluster.slurm.cpus_per_task; srun does not inherit it from sbatch), "
            "or raise the quota of the container"
        )
        return warn("cores", fact, hint)
    return ok("cores", fact)


def shared_memory(ranks: int, *, gpus: bool, shm: Path = SHM) -> Finding:
    """/dev/shm, through which NCCL connects the ranks of one host; gloo does not need it."""
    need = 32 * ranks << 20  # what NCCL maps for the channels of one rank, and a margin
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
    hint = (
        f"{show_bytes(need)} are needed: remove unused files, or enlarge it (docker --shm-size=8g)"
    )
    return fail("shared memory", fact, hint) if gpus else warn("shared memory", fact, hint)


def leftovers(*, shm: Path = SHM) -> Finding | None:
    """Files of this user in /dev/shm that no process has open; None where there are none."""
    left = unused(shm)
    if not left:
        return None
    size = show_bytes(sum(left.values()))
    names = " ".join(str(path) for path in sorted(left)[:3]) + (" ..." if len(left) > 3 else "")
    fact = f"{len(left)} file(s), {size}, that none of your processes has open: {names}"
    return warn(
        "shared memory", fact, "if they are left from jobs that were killed, remove them with rm"
    )


def unused(shm: Path) -> dict[Path, int]:
    """Files of this user in a folder that no process has open, with their size."""
    try:
        sizes = {
            Path(entry.path): entry.stat().st_size
            for entry in os.scandir(shm)
            if entry.is_file(follow_symlinks=False) and entry.stat().st_uid == os.getuid()
        }
    except OSError:  # the folder does not exist or has changed meanwhile
        return {}
    used = _in_use(shm) if sizes else set()
    return {path: size for path, size in sizes.items() if str(path) not in used}


def _in_use(shm: Path) -> set[str]:
    paths = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text(errors="replace")
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # the process has ended, or belongs to another user
            continue
        paths |= {line[line.index(str(shm)) :] for line in maps.splitlines() if str(shm) in line}
        paths |= {link for link in links if link.startswith(str(shm))}
    return paths


def start_name_lookup() -> RunningCommand:
    """Look up the addresses of this host's name. With a dead name server this takes 10 s and more."""
    return RunningCommand(["getent", "ahostsv4", socket.gethostname()], timeout_s=2.0)


def host_name(lookup: CommandResult, env: Mapping[str, str], *, several: bool) -> Finding:
    """Whether other hosts can connect to the address of this host's name; gloo listens there by default."""
    name = socket.gethostname()
    interface = env.get("GLOO_SOCKET_IFNAME", "")
    if lookup.state == "missing":
        return ok("host name", f"{name} (getent, which looks it up, is not available)")
    if lookup.state == "hung":
        hint = "add this host to /etc/hosts: every start of ranks waits for this lookup"
        return warn("host name", f"{name}: {lookup.failure} of the name service", hint)
    addresses = list(
        dict.fromkeys(line.split()[0] for line in lookup.out.splitlines() if line.strip())
    )
    shown = ", ".join(addresses) or "no address"
    outside = [address for address in addresses if not address.startswith("127.")]
    if outside or (interface and not interface_problem(interface)):
        return ok(
            "host name", f"{name} is {shown}" + (f"; gloo uses {interface}" if interface else "")
        )
    available = (
        ", ".join(f"{name} ({address})" for name, address in interfaces().items()) or "none is up"
    )
    first = next(iter(interfaces()), "eth0")
    hint = (
        f"for several nodes set cluster.env.GLOO_SOCKET_IFNAME: {first} (interfaces: {available})"
    )
    fact = f"{name} is {shown}, to which no other host can connect"
    return (
        warn("host name", fact, hint) if several or not addresses else ok("host name", fact, hint)
    )


def interface_problem(name: str, *, net: Path = _NET) -> str:
    """What is wrong with a value of GLOO_SOCKET_IFNAME; empty if nothing."""
    if "," in name or name.startswith(("^", "=")):
        return f"{name!r} is a list or a pattern; gloo accepts one name"
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
