"""The table that people read: every width, every name."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale_launcher.jobs.run_state import RunStatus, State
from lmscale_launcher.jobs.status import table

RUNNING = RunStatus(
    run="llama-1b", path=Path("/runs/llama-1b"), state="running", reason="", kind="slurm", job="17",
    nodes=4, min_nodes=2, hosts=("n1", "n2", "n3", "n4"), step=12_345, total_steps=100_000, loss=2.3456,
    tokens_per_s=1.234e6, eta_s=7500, restarts=2, checkpoint_step=12_000, checkpoint_age_s=185,
    attempt=3, start="slurm-17-2", code=None, heard_s=2,
)  # fmt: skip
PENDING = replace(
    RUNNING, run="sweep/a", state="pending", reason="more nodes than the partition has", step=0,
    loss=None, tokens_per_s=None, eta_s=None, restarts=0, checkpoint_step=None, checkpoint_age_s=None,
)  # fmt: skip
FAILED = replace(RUNNING, run="c", state="failed", reason="damaged data, 65: " + "shard " * 60)


def test_a_row_a_run_and_its_reason_below() -> None:
    assert table([RUNNING, PENDING], width=120) == [
        "RUN       STATE    NODES          STEP   LOSS  TOKENS/S    ETA  RESTARTS  CHECKPOINT",
        "llama-1b  running      4  12345/100000  2.346     1.23M  2h05m         2  12000, 3m05s ago",
        "sweep/a   pending    2-4      0/100000      -         -      -         0  -",
        "  more nodes than the partition has",
    ]


def test_eighty_columns_hold_every_column() -> None:
    lines = table([RUNNING, replace(RUNNING, run="a-rather-long-name-of-a-run")], width=79)
    assert all(len(line) <= 79 for line in lines)
    assert len(lines[0].split()) == 9
    assert lines[1].split() == [
        "llama-1b", "running", "4", "12.3K/100K", "2.346", "1.23M", "2h05m", "2", "12K,", "3m05s",
    ]  # fmt: skip
    assert lines[2].startswith("a-rather-l")


def test_a_single_run_says_where_it_is_and_all_of_its_reason() -> None:
    lines = table([FAILED], width=80)
    assert " ".join(lines).count("shard") == 60
    assert lines[-1] == "  slurm job 17 on n1, n2, n3, n4"
    assert sum("shard" in line for line in table([FAILED, RUNNING], width=80)) == 2


def test_a_low_terminal_says_how_many_are_not_shown() -> None:
    many = [replace(RUNNING, run=f"r{n}") for n in range(100)]
    lines = table(many, width=80, height=10)
    assert len(lines) == 10
    assert lines[-1] == "... and 92 more"
    assert len(table(many[:9], width=80, height=10)) == 10
    assert "more" not in table(many[:9], width=80, height=10)[-1]


def test_a_name_cannot_move_the_cursor() -> None:
    text = "\n".join(table([replace(RUNNING, run="a\x1b[2Jb\nc", reason="x\ry")], width=100))
    assert "\x1b" not in text and "\r" not in text
    assert r"a\x1b[2Jb c" in text


def test_colours_are_only_paint() -> None:
    plain = table([RUNNING, PENDING, FAILED], width=90)
    painted = table([RUNNING, PENDING, FAILED], width=90, colour=True)
    assert painted != plain
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in painted] == plain


standings = st.builds(
    RunStatus,
    run=st.text(min_size=1, max_size=40), path=st.just(Path("/r")),
    state=st.sampled_from(get_args(State)), reason=st.text(max_size=300),
    kind=st.sampled_from([None, "slurm"]), job=st.sampled_from([None, "17"]),
    nodes=st.one_of(st.none(), st.integers(1, 2048)), min_nodes=st.one_of(st.none(), st.integers(1, 9)),
    hosts=st.lists(st.text(max_size=12), max_size=12).map(tuple),
    step=st.one_of(st.none(), st.integers(0, 10**9)),
    total_steps=st.one_of(st.none(), st.integers(0, 10**9)),
    loss=st.one_of(st.none(), st.floats(0, 1e9)), tokens_per_s=st.one_of(st.none(), st.floats(0, 1e12)),
    eta_s=st.one_of(st.none(), st.floats(0, 1e9)), restarts=st.integers(0, 999),
    checkpoint_step=st.one_of(st.none(), st.integers(0, 10**9)),
    checkpoint_age_s=st.one_of(st.none(), st.floats(0, 1e8)), attempt=st.none(), start=st.none(),
    code=st.none(), heard_s=st.none(),
)  # fmt: skip


@given(found=st.lists(standings, max_size=6), width=st.integers(20, 160))
@pytest.mark.parametrize("colour", [False, True])
def test_nothing_is_wider_than_the_terminal(
    found: list[RunStatus], width: int, colour: bool
) -> None:
    for line in table(found, width=width, colour=colour):
        bare = re.sub(r"\x1b\[\d+m", "", line)
        wide = sum(1 for letter in bare if not letter.isascii() and letter != "…")
        assert len(bare) <= width
        if not wide:
            assert bare.isprintable() or not bare
