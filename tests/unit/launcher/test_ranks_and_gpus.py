"""Who is a rank, how many ranks a host gets, and what a rank's output becomes."""

import os
import signal
from pathlib import Path

import pytest

from lmscale.base.errors import UsageError
from lmscale.base.world import World
from lmscale_launcher.gpus import count_cores, count_gpus
from lmscale_launcher.rank_mode import rank_env
from lmscale_launcher.supervisor.output import Output
from lmscale_launcher.supervisor.rank_process import NodeTopology
from lmscale_launcher.supervisor.signals import Signals


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"},  # a batch script
        {"SLURM_STEP_ID": str(0xFFFFFFFB), "SLURM_PROCID": "0"},  # the batch step
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # an interactive one
        {"LMSCALE_START": "7-0"},
    ],
)
def test_these_supervise(env: dict[str, str]) -> None:
    assert rank_env(env) is None


def test_torchrun_made_a_rank() -> None:
    assert rank_env({"RANK": "1", "WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}) == {}


def test_mpirun_made_a_rank_and_mpi_says_where_to_meet() -> None:
    env = {
        "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-host-77@1", "PMIX_RANK": "3",
    }  # fmt: skip
    added = rank_env(env)
    assert added == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    world = World.from_env({**env, **added, "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (world.rank, world.local_rank, world.size, world.local_size) == (3, 1, 4, 2)
    hydra = {
        "PMI_RANK": "1",
        "PMI_SIZE": "2",
        "MPI_LOCALRANKID": "1",
        "MPI_LOCALNRANKS": "2",
    }
    added = rank_env(hydra)
    assert added == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert rank_env({"PMIX_RANK": "0"}) == {}


STEP = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_JOB_ID": "4711",
}  # fmt: skip


def test_a_real_slurm_step_made_a_rank_and_several_hosts_need_an_address() -> None:
    added = rank_env(STEP)
    assert added is not None
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        World.from_env({**STEP, **added})
    world = World.from_env({**STEP, **added, "MASTER_ADDR": "node0"})
    assert (world.rank, world.local_rank, world.local_size, world.node) == (9, 1, 8, 1)
    uneven = rank_env({**STEP, "SLURM_STEP_TASKS_PER_NODE": "8,4(x2)"})
    assert uneven is not None and "LOCAL_WORLD_SIZE" not in uneven


def test_slurm_tasks_of_one_host_meet_there_without_a_word() -> None:
    one = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "16"}
    added = rank_env(one)
    assert added is not None and added["MASTER_ADDR"] == "127.0.0.1"
    assert 20_000 <= int(added["MASTER_PORT"]) < 30_000
    same = rank_env({**one, "SLURM_PROCID": "0"})
    assert same is not None and same["MASTER_PORT"] == added["MASTER_PORT"]
    assert "MASTER_PORT" not in (rank_env({**one, "MASTER_PORT": "7"}) or {})
    by_mpi = rank_env({**one, "PMIX_RANK": "9"})  # srun --mpi=pmix: MPI is asked
    assert by_mpi is not None and by_mpi["RANK"] == "9" and "MASTER_PORT" not in by_mpi


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("-1", 0), ("0", 1), ("0,1, 3", 3), ("0,-1,2", 1), ("GPU-1,MIG-2", 2), ("none", 0)],
)
def test_visible_devices_are_counted_as_cuda_does(visible: str, count: int) -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_gpus_are_counted_by_the_tool_or_in_proc(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: a)'\necho 'GPU 1: X (UUID: b)'\n")
    tool.chmod(0o755)
    assert count_gpus({"PATH": str(tmp_path)}) == 2
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert count_gpus({"PATH": str(tmp_path)}) == 0
    (tmp_path / "proc" / "0000:07:00.0").mkdir(parents=True)
    assert count_gpus({"PATH": ""}, proc=tmp_path / "proc") == 1
    assert count_gpus({"PATH": ""}, proc=tmp_path / "absent") == 0


@pytest.mark.parametrize(("text", "most"), [("150000 100000", 1), ("20000 100000", 1)])
def test_a_container_quota_limits_cores(tmp_path: Path, text: str, most: int) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    assert count_cores(cpu_max=quota) == most
    quota.write_text("max 100000")
    assert count_cores(cpu_max=quota) == len(os.sched_getaffinity(0))


def test_a_given_thread_count_stays_and_a_torchrun_around_us_is_left_out() -> None:
    env = {"OMP_NUM_THREADS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True", "HOME": "/h"}
    got = NodeTopology(2).environment(env, rank=1, port=5, start="s")
    assert (got["OMP_NUM_THREADS"], got["HOME"], got["MASTER_PORT"]) == ("3", "/h", "5")
    assert not any(key.startswith("TORCHELASTIC") for key in got)


def test_repeated_signals_are_dropped_for_two_seconds() -> None:
    now = 0.0
    signals = Signals(clock=lambda: now)
    got = []
    for at, number in [(0.0, 15), (0.1, 15), (0.2, 2), (1.9, 2), (2.1, 15), (2.2, 17), (5.0, 1)]:
        now = at
        signals.note(number)
        got.append([int(one) for one in signals.take()])
    os.close(signals.descriptor)
    assert got == [[15], [], [2], [], [15], [], [15]]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # it was never entered


class Screen:
    """What an Output has written."""

    def __init__(self, tmp_path: Path, *, in_place: bool) -> None:
        self._read, self._write = os.pipe()
        self.output = Output(self._write, in_place=in_place)
        self.logs = tmp_path / "logs"
        self.output.open_logs(self.logs, "s", range(2))

    def text(self) -> bytes:
        self.output.close()
        os.close(self._write)
        with open(self._read, "rb") as file:
            return file.read()


def test_lines_of_others_do_not_break_the_progress_line(tmp_path: Path) -> None:
    screen = Screen(tmp_path, in_place=True)
    for piece in (b"\r\x1b[Kstep 1", b"\r\x1b[Kstep 2"):
        screen.output.feed(0, piece)
    screen.output.feed(1, b"careful\n")
    screen.output.feed(0, b"\r\x1b[Kstep 3\n")
    want = b"\r\x1b[Kstep 1\r\x1b[Kstep 2\r\x1b[K[r1] careful\n\r\x1b[Kstep 3\n"
    assert screen.text() == want
    assert (screen.logs / "s-rank-0.log").read_text() == "step 3\n"
    assert (screen.logs / "s-rank-1.log").read_text() == "careful\n"


def test_pieces_of_lines_are_put_together(tmp_path: Path) -> None:
    screen = Screen(tmp_path, in_place=False)
    for rank, piece in [(0, b"on"), (1, b"ot"), (0, b"e\ntwo"), (1, b"her\n")]:
        screen.output.feed(rank, piece)
    assert screen.text() == b"one\n[r1] other\ntwo\n"


def test_output_goes_on_without_terminal_and_without_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen(tmp_path, in_place=False)
    screen.output._files[0].close()
    screen.output._files[0] = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    screen.output.feed(0, b"one\n")
    said = screen.text()
    assert said.startswith(b"lmscale: the log of rank 0 ends here")
    assert said.endswith(b"one\n")
    Output(-1, in_place=False).feed(0, b"nobody sees this\n")
