"""The pool itself must be able to fail: otherwise no test in this folder means anything."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lmscale.distributed.process_group import lost_peer
from tests.support.rank_pool import CaseFailed, Died, Pool


def where() -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), os.getpid()


def fail_on(rank: int) -> None:
    assert dist.get_rank() != rank, "on purpose"
    dist.barrier()


def hang_on(rank: int) -> None:
    while dist.get_rank() == rank:
        time.sleep(0.1)


def die_on(rank: int) -> bool:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        return lost_peer(error)
    return False


def return_a_lambda() -> object:
    return lambda: None


def test_ranks_stay_from_case_to_case(ranks):
    first, second = ranks(2)(where), ranks(2)(where)
    assert [answer[:2] for answer in first] == [(0, 2), (1, 2)]
    assert first == second


def test_an_assertion_in_one_rank_fails_the_test_at_once_and_the_next_case_runs(ranks):
    began = time.monotonic()
    with pytest.raises(CaseFailed, match=r"rank 1: (.|\n)*on purpose"):
        ranks(2)(fail_on, 1)
    assert time.monotonic() - began < 20
    assert [answer[:2] for answer in ranks(2)(where)] == [(0, 2), (1, 2)]


def test_a_hang_ends_at_the_deadline_and_shows_the_stack(ranks):
    with pytest.raises(CaseFailed, match=r"rank 0: no answer(.|\n)*in hang_on"):
        ranks(2)(hang_on, 0, deadline_s=1.0)


def test_a_death_is_a_failure_unless_announced(ranks):
    with pytest.raises(CaseFailed, match="rank 1: died with exit code -9"):
        ranks(2)(die_on, 1)
    survivor, dead = ranks(2)(die_on, 1, deaths=[1])
    assert survivor is True and dead == Died(-9)
    with pytest.raises(CaseFailed, match="was expected to die and did not"):
        ranks(2)(where, deaths=[1])


def test_a_result_that_does_not_pickle_is_an_error(ranks):
    with pytest.raises(CaseFailed, match="pickle"):
        ranks(2)(return_a_lambda)


def test_closing_leaves_no_process():
    pool = Pool(1)
    ((_, _, pid),) = pool(where)
    pool.close()
    assert not Path(f"/proc/{pid}").exists()
