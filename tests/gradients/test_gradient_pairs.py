"""Every engine with every option, two of them at a time, computes the gradients and updates of one process."""

import json
from itertools import product

import gradient_matrix
import pytest
import torch

from lmscale.config.proven import FACTORS, OPEN, PATH, ProvenTable, factors
from tests.gradients.case import ROWS, GradientCase, by_world, micro_batches, rows_of
from tests.gradients.cover import PAIR_VALUES, TRIPLE_VALUES, missing, pairs, triples
from tests.gradients.errors import verdict
from tests.gradients.page import proven
from tests.gradients.run import on_ranks, one_process


@pytest.mark.parametrize("case", by_world(pairs()), ids=lambda case: case.name)
def test_a_case_is_one_process(ranks, case):
    answers = ranks(case.ranks)(on_ranks, case)
    _, problems = verdict(case, answers, one_process(case))
    assert not problems


def test_every_pair_and_every_triple_that_a_case_can_have_is_in_one():
    for cases, values, strength in ((pairs(), PAIR_VALUES, 2), (triples(), TRIPLE_VALUES, 3)):
        assert len({case.name for case in cases}) == len(cases)
        assert not any(case.problem() for case in cases)
        assert not missing(cases, values, strength)


def test_the_table_that_we_ship_has_every_case_that_is_run():
    shipped = json.loads(PATH.read_text())["cases"]
    wanted = [case for case in triples() if case.dropout != "drawn"]
    assert len(shipped) == len(wanted)
    for case in wanted:
        words = {factor: case.words[factor] for factor in (*FACTORS, *OPEN)}
        assert {**words, "ranks": case.ranks, "dp": case.dp} in shipped, case.name


def test_the_table_that_we_ship_is_of_this_code():
    """Comments aside. Where this fails: `make matrix`, or nothing says what the engines compute now."""
    lines = (gradient_matrix.ROOT / "docs" / "gradients.jsonl").read_text().splitlines()
    assert {json.loads(line)["sources"] for line in lines} == {gradient_matrix.digest()}


def test_a_combination_of_which_a_case_failed_is_refused_though_every_three_of_its_words_passed():
    cases = [case for case in triples() if case.dropout != "drawn" and case.tp != "8"]
    passed = [{"name": case.name, "verdict": "passed"} for case in cases]
    victim, other = cases[3], cases[4]
    table = ProvenTable(proven([*passed, {"name": victim.name, "verdict": "failed"}]))
    assert not table.proves({factor: victim.words[factor] for factor in FACTORS})
    assert table.proves({factor: other.words[factor] for factor in FACTORS})


def test_a_name_is_its_case_and_a_case_is_the_run_that_it_names():
    for case in triples():
        assert GradientCase.named(case.name) == case
        words = factors(case.config())
        assert words == {
            key: {"drawn": "on"}.get(case.words[key], case.words[key]) for key in words
        }


def test_the_ranks_share_the_rows_of_a_step_whatever_their_number():
    engines = ("fsdp", "hsdp")
    for engine, accumulation, world in product(engines, ("1", "3"), ("smallest", "largest")):
        case = GradientCase(
            engine=engine, accumulation=accumulation, world=world, targets="unequal"
        )
        shares = [micro_batches(case, 1, rank) for rank in range(case.dp)]
        assert all(len(share) == int(accumulation) for share in shares)
        assert all(len(share[-1].rows_B) < len(share[0].rows_B) for share in shares) == (
            accumulation == "3"
        )
        found = torch.cat([batch.inputs.tokens_BL for share in shares for batch in share])
        assert torch.equal(found, rows_of(case, 1).inputs.tokens_BL)
        assert len(found) == ROWS
