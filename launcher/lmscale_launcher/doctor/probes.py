"""Checks of torch, gloo, deepspeed and MPI, each in a process of its own (`lmscale probe PART`)."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmscale.base.env import scrubbed
from lmscale.base.listener import RENDEZVOUS_FD, listen
from lmscale.base.units import show_bytes
from lmscale_launcher.command_line import lmscale_command
from lmscale_launcher.doctor import gpu as nvidia
from lmscale_launcher.doctor.command_result import CommandResult, RunningCommand, run_command
from lmscale_launcher.doctor.findings import Finding, fail, ok, warn
from lmscale_launcher.doctor.host import interface_problem

ANSWER_S = 120.0  # importing torch from a cold file server takes a minute
_OLDEST_TORCH = (2, 11)
_SHOW_ERROR = "see the whole error with"


class Probes:
    """Probes that run while the caller makes other checks."""

    def __init__(self, env: Mapping[str, str]) -> None:
        # The threads of four processes at once would only wait for each other.
        self._env = {**scrubbed(env), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._torch, self._deepspeed = self._start("torch"), self._start("deepspeed")
        with listen() as listener:
            self._gloo = [self._gloo_rank(rank, listener) for rank in (0, 1)]

    def torch(self) -> tuple[list[Finding], dict[str, Any]]:
        """Version, CUDA, NCCL and bf16; and the raw result of the probe for other checks."""
        facts, problem = _read(self._torch.result(), "torch")
        if facts is None:
            hint = f"{_SHOW_ERROR}: {sys.executable} -c 'import torch'"
            return [fail("torch", problem, hint)], {}
        return [*_version(facts), *_cuda(facts)], facts

    def gloo(self) -> list[Finding]:
        """Whether two processes of this host connect under its name, and at which address."""
        interface = self._env.get("GLOO_SOCKET_IFNAME", "")
        problem = interface_problem(interface) if interface else ""
        answers = [command.result() for command in self._gloo]
        if problem:
            return [
                fail("gloo", f"GLOO_SOCKET_IFNAME: {problem}", "set one interface, see `ip -br a`")
            ]
        facts, _ = _read(answers[0], "gloo")
        if facts is None or answers[1].code != 0:
            reason = connection_problem(answers[0] if facts is None else answers[1])
            name = socket.gethostname()
            hint = f"check that {name} is an address of this host (`getent hosts {name}`), and its firewall"
            return [fail("gloo", f"two processes cannot connect at {name}: {reason}", hint)]
        addresses = ", ".join(facts["listens_on"]) or "an unknown address"
        if all(address.startswith(("127.", "::1")) for address in facts["listens_on"]):
            hint = "several nodes could not connect: see the line of the host name"
            return [ok("gloo", f"two processes connected, at {addresses}: this host only", hint)]
        return [ok("gloo", f"two processes connected, at {addresses}")]

    def deepspeed(self) -> list[Finding]:
        """Whether it can be imported, and which of its extensions could be built."""
        facts, problem = _read(self._deepspeed.result(), "deepspeed")
        if facts is None:
            hint = "engine.kind fsdp and ddp do not need it; "
            hint += f"{_SHOW_ERROR}: {sys.executable} -c 'import deepspeed'"
            return [warn("deepspeed", problem, hint)]
        found = [ok("deepspeed", f"{facts['version']}, imports")]
        can = [*facts["built"], *facts["buildable"]]
        listed = (
            f"built: {_names(facts['built'])}; can be built when used: {_names(facts['buildable'])}"
        )
        missing = [tool for tool in facts["missing"] if tool != "nvcc"]
        if missing:
            hint = (
                f"install {' and '.join(missing)}; engine.kind=deepspeed works without extensions"
            )
            found.append(ok("extensions", f"none can be built: no {', '.join(missing)}", hint))
        else:
            hint = "" if can else "engine.kind=deepspeed works without extensions"
            found.append(ok("extensions", f"{listed}; not: {_names(facts['not'])}", hint))
        return found

    def _start(self, part: str, *, inherits: int | None = None, **more: str) -> RunningCommand:
        env = {**self._env, **more}
        return RunningCommand(
            lmscale_command("probe", part), timeout_s=ANSWER_S, env=env, inherits=inherits
        )

    def _gloo_rank(self, rank: int, listener: socket.socket) -> RunningCommand:
        return self._start(
            "gloo",
            inherits=listener.fileno() if rank == 0 else None,
            RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR=socket.gethostname(),
            MASTER_PORT=str(listener.getsockname()[1]),
            **{RENDEZVOUS_FD: str(listener.fileno())},
        )


def connection_problem(answer: CommandResult) -> str:
    """Why ranks could not connect, without the advice for a training run."""
    return answer.failure.partition(". The cause is in")[0]


def gpus(driver: nvidia.Driver, facts: Mapping[str, Any], env: Mapping[str, str]) -> list[Finding]:
    """Whether torch finds the GPUs that the driver lists."""
    if not facts or driver.count == 0 or nvidia.assigned(env) == 0:
        return []
    devices = facts.get("devices", [])
    if not devices:
        version = driver.gpus[0].driver if driver.gpus else "unknown"
        if facts["cuda"] is None:
            hint = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
            return [fail("torch and GPUs", f"torch {facts['version']} is built without CUDA", hint)]
        hint = f"install torch for an older CUDA, or a newer driver than {version}"
        return [fail("torch and GPUs", f"torch for CUDA {facts['cuda']} finds no GPU", hint)]
    found = [_device(index, device) for index, device in enumerate(devices)]
    expected = nvidia.assigned(env) or driver.count
    if len(devices) != expected:
        hint = "see CUDA_VISIBLE_DEVICES, and `nvidia-smi` for a GPU that has failed"
        fact = f"torch finds {len(devices)} GPUs, {expected} are expected"
        found.append(fail("torch and GPUs", fact, hint))
    return found


def mpi(env: Mapping[str, str], *, required: bool) -> list[Finding]:
    """Whether mpirun and mpi4py use the same MPI: two ranks must find each other."""
    beside = Path(sys.executable).with_name("mpirun")
    program = shutil.which("mpirun", path=env.get("PATH")) or (
        str(beside) if beside.exists() else ""
    )
    alone, problem = _read(
        run_command(lmscale_command("probe", "mpi"), timeout_s=30, env=scrubbed(env)), "mpi4py"
    )
    unless = "" if required else "only needed for mpirun; "
    level = fail if required else ok
    if alone is None:
        return [level("mpi4py", problem, f"{unless}pip install mpi4py, beside an MPI library")]
    library = f"{alone['vendor']} {alone['version']}"
    found = [ok("mpi4py", f"imports, over {library}")]
    if not program:
        hint = f"{unless}put the mpirun of {library} on PATH"
        return [*found, level("mpirun", "not on PATH", hint)]
    version = run_command([program, "--version"], timeout_s=10, env=scrubbed(env))
    brand = _brand(version.out)
    if brand and brand != alone["vendor"]:
        hint = "use the mpirun of mpi4py's library: with another one each rank would be alone"
        fact = f"{program} is {brand}'s, mpi4py was built for {library}"
        return [*found, (fail if required else warn)("mpirun", fact, hint)]
    return [*found, _two_ranks(program, brand, env, required=required)]


def _two_ranks(program: str, brand: str, env: Mapping[str, str], *, required: bool) -> Finding:
    clean = scrubbed(env)
    options: list[str] = []
    if brand == "Open MPI":
        options = ["--map-by", ":OVERSUBSCRIBE"]  # this host may have only one core
        if os.getuid() == 0:
            clean |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    answer = run_command(
        [program, *options, "-n", "2", *lmscale_command("probe", "mpi-rank")],
        timeout_s=45,
        env=clean,
    )
    sizes = [json.loads(line)["size"] for line in answer.out.splitlines() if line.startswith("{")]
    if answer.succeeded and sizes == [2, 2]:
        return ok("mpirun", f"{program}: two ranks found each other")
    bad = fail if required else warn
    if answer.succeeded:
        hint = (
            "do not mix MPI libraries: build mpi4py with the mpirun on PATH, or use its own mpirun"
        )
        return bad("mpirun", f"{program}: two ranks start, but each is alone", hint)
    return bad("mpirun", f"{program} -n 2: {answer.failure}", "try the same command by hand")


def _brand(version: str) -> str:
    """The vendor of an mpirun, with the names of MPI.get_vendor."""
    brands = (("Open MPI", "Open MPI"), ("OpenRTE", "Open MPI"), ("Intel", "Intel MPI"))
    for word, brand in (*brands, ("HYDRA", "MPICH"), ("MPICH", "MPICH")):
        if word in version:
            return brand
    return ""


def _version(facts: Mapping[str, Any]) -> list[Finding]:
    version = str(facts["version"])
    parts = [
        int(part) for part in version.split("+", maxsplit=1)[0].split(".")[:2] if part.isdecimal()
    ]
    oldest = ".".join(str(part) for part in _OLDEST_TORCH)
    if tuple(parts) < _OLDEST_TORCH:
        hint = f"pip install 'torch>={oldest}'"
        return [fail("torch", f"{version}, older than {oldest}", hint)]
    return [ok("torch", f"{version}, gloo {'is' if facts['gloo'] else 'is not'} built in")]


def _cuda(facts: Mapping[str, Any]) -> list[Finding]:
    if facts["available"]:
        return [ok("CUDA", f"{facts['cuda']}, NCCL {facts['nccl']}")]
    built = f"built for CUDA {facts['cuda']}, no GPU" if facts["cuda"] else "built without"
    native = "bf16 in hardware" if facts["cpu_bf16"] else "bf16 only by emulation: use fp32"
    return [ok("CUDA", f"{built}: CPU only, over gloo; {native}")]


def _device(index: int, device: Mapping[str, Any]) -> Finding:
    what = f"cuda:{index}"
    if "error" in device or not device["works"]:
        hint = "see `nvidia-smi`; a wheel of torch may lack this GPU's architecture"
        return fail(what, str(device.get("error", f"{device['name']} gives a wrong product")), hint)
    fact = f"{device['name']}, {show_bytes(device['memory'])}"
    if not device["bf16"]:
        return warn(what, f"{fact}, no bf16", "set engine.precision=fp32: bf16 is emulated, slowly")
    return ok(what, f"{fact}, bf16")


def _read(answer: CommandResult, what: str) -> tuple[dict[str, Any] | None, str]:
    lines = answer.out.strip().splitlines()
    if answer.succeeded and lines:
        facts: dict[str, Any] = json.loads(lines[-1])
        return facts, ""
    if answer.state == "hung":
        return None, f"{what}: {answer.failure}"
    return None, answer.failure


def _names(names: list[str]) -> str:
    return ", ".join(name for name in names if not name.startswith("deepspeed_")) or "none"
