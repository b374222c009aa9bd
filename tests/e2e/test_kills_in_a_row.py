"""Three kills of a rank under one supervisor; `make soak` does twenty."""

import os
import random
from pathlib import Path

import pytest
from kills_in_a_row import kill_in_a_row

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("LMSCALE_TEST_SEED", random.SystemRandom().randrange(10**6)))


def test_a_killed_rank_comes_back_and_leaves_nothing(tmp_path: Path) -> None:
    print(f"LMSCALE_TEST_SEED={SEED}")
    outcome = kill_in_a_row(tmp_path, 3, SEED)
    assert not outcome.problems
    assert len(outcome.recovery_s) == 3
