import os
import signal
import time
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import torch.distributed as dist

from lmscale.base.errors import DistributedError, RetryableError
from lmscale.base.world import World
from lmscale.distributed.mesh import make_mesh
from lmscale.distributed.process_group import (
    agree,
    broadcast_object,
    distributed,
    gather_objects,
    on_root,
    sum_over,
)
from tests.support.rank_pool import Died

CPU = torch.device("cpu")
FULL = "reading or writing /disk: No space left on device; free some space and start again"
BROKEN = "reading or writing /disk: Input/output error; check the storage and start again"


@dataclass(frozen=True)
class Sizes:
    dp_replicate: int = 1
    dp_shard: int | Literal["auto"] = "auto"
    tp: int = 1


def talk() -> tuple[object, ...]:
    rank = dist.get_rank()
    numbers = torch.tensor([rank, 1.0], dtype=torch.float64)
    total = sum_over(numbers)
    agreed = agree({"stop": int(rank == 1), "error": 0, "writer": 7 - rank})
    return (
        numbers.tolist(),
        total.tolist(),
        agreed,
        broadcast_object({"from": rank}, src=1),
        gather_objects(rank * 10),
    )


def test_everyone_hears_the_same(ranks):
    for rank, (numbers, total, agreed, sent, gathered) in enumerate(ranks(2)(talk)):
        assert numbers == [rank, 1.0], "sum_over must not write its input"
        assert total == [1.0, 2.0]
        assert agreed == {"stop": 1, "error": 0, "writer": 7}
        assert sent == {"from": 1}
        assert gathered == [0, 10]


def ask_differently() -> str:
    try:
        agree({"stop": 0, f"own-{dist.get_rank()}": 1})
    except AssertionError as error:
        return str(error)
    return "agreed"


def test_different_flags_on_ranks_are_an_error(ranks):
    assert all("different flags" in answer for answer in ranks(2)(ask_differently))


def root_only(fails: bool) -> tuple[object, ...]:
    def work() -> int:
        assert dist.get_rank() == 0
        if fails:
            raise OSError(5, "Input/output error", "/disk")
        return 42

    try:
        return "ok", on_root(work)
    except RetryableError as error:
        return "error", str(error)


def test_what_rank_0_does_alone_everyone_knows(ranks):
    assert ranks(2)(root_only, False) == [("ok", 42)] * 2
    assert ranks(2)(root_only, True) == [("error", BROKEN)] * 2


def place(sizes: Sizes) -> dict[str, object]:
    rank = dist.get_rank()
    mesh = make_mesh(sizes, World(rank, rank, 4, 4, "x:1"), "cpu", timeout_s=30)
    groups = {axis: mesh.device_mesh.get_group(axis) for axis in mesh.device_mesh.mesh_dim_names}
    mine = torch.tensor([2.0**rank])
    return {
        "dp": (mesh.dp_rank, mesh.dp_size, sum_over(mine, mesh.dp_group).item()),
        "tp": (mesh.tp_rank, mesh.tp_size),
        "sums": {axis: sum_over(mine, group).item() for axis, group in groups.items()},
        "sub": mesh.device_mesh["replicate", "shard"].mesh.flatten().tolist(),
    }


def test_axes_and_their_groups(ranks):
    got = ranks(4)(place, Sizes(dp_replicate=2, dp_shard=1, tp=2))
    assert [rank["dp"] for rank in got] == [(0, 2, 5.0), (0, 2, 10.0), (1, 2, 5.0), (1, 2, 10.0)]
    assert [rank["tp"] for rank in got] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert got[3]["sums"] == {"replicate": 10.0, "shard": 8.0, "tp": 12.0}
    assert got[3]["sub"] == [1, 3]


def test_data_parallel_alone_uses_all_ranks(ranks):
    got = ranks(4)(place, Sizes(dp_replicate=2))
    assert [rank["dp"] for rank in got] == [(n, 4, 15.0) for n in range(4)]
    assert [rank["sums"]["shard"] for rank in got] == [3.0, 3.0, 12.0, 12.0]


def deadline_of_groups() -> float:
    """A rank that never answers, on a group the mesh made."""
    rank = dist.get_rank()
    mesh = make_mesh(Sizes(dp_replicate=2), World(rank, rank, 4, 4, "x:1"), "cpu", timeout_s=1.0)
    began = time.monotonic()
    if rank == 0:
        with pytest.raises(DistributedError):
            sum_over(torch.zeros(1), mesh.device_mesh.get_group("shard"))
    waited = time.monotonic() - began
    dist.barrier()
    return waited


def test_groups_of_the_mesh_have_a_deadline(ranks):
    assert 0.5 < ranks(4)(deadline_of_groups)[0] < 10


def lose_a_peer(world: World, how: str, timeout_s: float) -> tuple[str, float]:
    began = time.monotonic()
    try:
        with distributed(world, device=CPU, timeout_s=timeout_s):
            agree({"stop": 0})
            began = time.monotonic()
            if world.rank == 1:
                if how == "error":
                    raise ValueError("a bug on one rank")
                if how == "stop":
                    time.sleep(timeout_s + 6)
                    return "late", 0.0
                os.kill(os.getpid(), signal.SIGKILL)
            for _ in range(1000):
                agree({"stop": 0})
    except DistributedError as error:
        return str(error), time.monotonic() - began
    except ValueError as error:
        return f"mine: {error}", 0.0
    return "nothing happened", 0.0


def test_a_killed_peer_is_noticed_by_all_within_seconds(ranks):
    first, dead, last = ranks(3, bare=True)(lose_a_peer, "kill", 60.0, deaths=[1])
    assert dead == Died(-signal.SIGKILL)
    for text, seconds in (first, last):
        assert "a peer is gone" in text
        assert seconds < 5


def test_an_exception_on_one_rank_frees_the_others(ranks):
    first, failed, last = ranks(3, bare=True)(lose_a_peer, "error", 60.0)
    assert failed == ("mine: a bug on one rank", 0.0)
    for text, seconds in (first, last):
        assert "a peer is gone" in text
        assert seconds < 5


def test_a_silent_peer_is_noticed_at_the_deadline(ranks):
    first, late, last = ranks(3, bare=True)(lose_a_peer, "stop", 2.0)
    assert late[0] == "late" or "a peer is gone" in late[0]
    for text, seconds in (first, last):
        assert "a peer is gone" in text
        assert 1 < seconds < 8


def meet_alone(world: World) -> str:
    if world.rank == 1:
        return "never came"
    try:
        with distributed(world, device=CPU, timeout_s=2.0):
            return "met"
    except DistributedError as error:
        return str(error)


def test_a_peer_that_never_comes_is_an_error_naming_the_meeting_point(ranks):
    alone, _ = ranks(2, bare=True)(meet_alone)
    assert "rank 0 of 2: joining at 127.0.0.1:" in alone


def one_rank(world: World) -> tuple[object, ...]:
    with distributed(world, device=CPU, timeout_s=5.0):
        mesh = make_mesh(Sizes(), world, "cpu")
        return agree({"stop": 3}), mesh.dp_size, gather_objects("x"), on_root(lambda: 1)


def test_a_world_of_one_has_a_group_too_and_leaves_it(ranks):
    want = ({"stop": 3}, 1, ["x"], 1)
    assert ranks(1, bare=True)(one_rank) == [want]
    assert ranks(1, bare=True)(one_rank) == [want]
