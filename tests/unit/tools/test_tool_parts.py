"""The pure parts of the long programs: a judge that overlooks nothing, trials from a seed, files that survive."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import crc32c
import judge
import kills
import pytest
import results

BATCH = 2


def run_lines(steps: int = 5) -> list[dict[str, Any]]:
    return [{"step": s, "loss": 3.0 - s / 7, "position": s * BATCH} for s in range(1, steps + 1)]


@pytest.mark.parametrize(
    "steps", [[1, 2, 4, 5], [1, 2, 2, 3, 4, 5], [2, 1, 3, 4, 5], [], [1, 2, 3, 4, 5, 6]]
)
def test_anything_but_one_line_a_step_is_a_problem(steps: list[int]) -> None:
    assert list(judge.step_problems([{"step": step} for step in steps], 5))
    assert not list(judge.step_problems(run_lines(), 5))


def test_one_changed_bit_is_a_problem() -> None:
    wanted, found = run_lines(), run_lines()
    found[3]["loss"] += 2**-52 * 2
    assert not list(judge.bitwise_problems(wanted, run_lines(), ("loss",), name="m"))
    (problem,) = judge.bitwise_problems(found, wanted, ("loss", "position"), name="m")
    assert "step 4" in problem
    assert "loss" in problem
    assert list(judge.bitwise_problems(wanted[:-1], wanted, ("loss",), name="m"))


def test_a_missing_or_empty_value_is_infinitely_wrong() -> None:
    wanted = run_lines()
    assert judge.worst(wanted, wanted, "loss") == 0
    assert judge.worst(wanted[:-1], wanted, "loss") == float("inf")
    assert judge.worst([], [], "loss") == float("inf")
    for value in (None, float("nan"), float("inf")):
        broken = [*wanted[:-1], {**wanted[-1], "loss": value}]
        assert judge.worst(broken, wanted, "loss") == float("inf")
    doubled = [*wanted[:-1], {**wanted[-1], "loss": wanted[-1]["loss"] * 2}]
    assert judge.worst(doubled, wanted, "loss") == pytest.approx(1)


@pytest.fixture
def planned(tmp_path: Path) -> dict[int, dict[str, Any]]:
    shard = tmp_path / "shard"
    shard.write_bytes(bytes(range(64)))
    return {
        position: {
            "position": position, "corpus": 0, "epoch": 0, "sample": position * 7 % 8,
            "shard": str(shard), "offset": position * 8, "bytes": 8,
        }
        for position in range(8)
    }  # fmt: skip


def traced_from(planned: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: row[key] for key in ("position", "corpus", "epoch", "sample")}
        | {"step": row["position"] // BATCH + 1}
        | {"crc32c": crc32c.crc32c(bytes(range(row["offset"], row["offset"] + 8)))}
        for row in planned.values()
    ]


def trace_problems(lines: list[dict[str, Any]], planned: dict[int, dict[str, Any]]) -> list[str]:
    traced, twice = judge.trace_of(lines)
    found = judge.trace_problems(traced, planned, batch=BATCH, crc_of=judge.crc_in_shard)
    return [*twice, *found]


@pytest.mark.parametrize("key", ["position", "corpus", "epoch", "sample", "step", "crc32c"])
def test_a_trace_that_differs_anywhere_is_a_problem(
    planned: dict[int, dict[str, Any]], key: str
) -> None:
    lines = traced_from(planned)
    assert not trace_problems(lines, planned)
    lines[3][key] += 100
    assert trace_problems(lines, planned)


def test_lost_and_repeated_samples_are_problems(planned: dict[int, dict[str, Any]]) -> None:
    lines = traced_from(planned)
    assert "not trained on" in trace_problems(lines[:-1], planned)[0]
    assert "twice" in trace_problems([*lines, lines[2]], planned)[0]


def test_a_seed_and_a_number_say_all_about_a_trial() -> None:
    trials = [kills.plan_trial(3, number) for number in range(240)]
    assert trials == [kills.plan_trial(3, number) for number in range(240)]
    assert trials != [kills.plan_trial(4, number) for number in range(240)]
    pairs = Counter((trial.engine, trial.victim) for trial in trials)
    assert set(pairs.values()) == {20}
    assert len(pairs) == len(kills.ENGINES) * len(kills.VICTIMS)
    assert {len(trial.kills) for trial in trials} == {1, 2, 3}
    assert {kill.moment for trial in trials for kill in trial.kills} == set(kills.MOMENTS)


def test_every_step_that_is_left_can_be_hit() -> None:
    shares = [number / 200 for number in range(200)]
    steps = {kills.Kill("step", share, 0).at_step(15, 30) for share in shares}
    assert steps == set(range(15, 31))
    assert kills.Kill("step", 0.9, 0).at_step(60, 59) == 59


def test_results_survive_a_torn_line_and_forget_other_sources(tmp_path: Path) -> None:
    path, now = tmp_path / "found" / "soak.jsonl", results.sources()
    first = results.Results(path, sources=now)
    first.append(trial=0)
    first.append(trial=1)
    with path.open("a") as file:
        file.write('{"trial": 2, "sour')
    again = results.Results(path, sources=now)
    assert [line["trial"] for line in again.lines] == [0, 1]
    again.append(trial=2)
    assert [json.loads(line)["trial"] for line in path.read_text().splitlines()] == [0, 1, 2]
    other = results.Results(path, sources="changed")
    assert other.lines == []
    with pytest.raises(SystemExit, match="sources changed"):
        other.append(trial=3)


def test_a_page_has_whole_tables(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    results.write_page(page, ["# Title", "", results.table(("a", "b"), [(1, 2.5)])])
    assert page.read_text() == "# Title\n\n| a | b |\n| --- | --- |\n| 1 | 2.5 |\n"


CODE = '''"""What it is for."""

import os  # of the system


def name() -> str:
    """Says it.

    At length.
    """
    # by default
    return "# no comment"
'''


def test_words_about_code_are_no_code() -> None:
    other = (
        CODE.replace("At length.", "Briefly.")
        .replace("  # of the system", "")
        .replace("# by default\n", "\n")
    )
    assert other != CODE and results.code_of(other) == results.code_of(CODE)
    for changed in (CODE.replace("# no", "# a"), CODE.replace("name", "title")):
        assert results.code_of(changed) != results.code_of(CODE)
    assert "import os" in results.code_of(CODE) and "At length" not in results.code_of(CODE)
