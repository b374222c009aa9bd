"""Every engine with every option, two of them at a time, computes the gradients and updates of one process."""

import json
from itertools import product

import pytest
import torch

from lmscale.config.proven import FACTORS, OPEN, PATH, ProvenTable, factors
from tests.gradients.case import ROWS, GradientCase, by_world, micro_batches, rows_of
from tests.gradients.cover import PAIR_VALUES, TRIPLE_VALUES, missing, pairs, triples
from tests.gradients.errors import verdict
from tests.gradients.page import proven
from tests.gradients.provenance import outdated_lines
from tests.gradients.run import on_ranks, one_process


@pytest.mark.parametrize("case", by_world(pairs()), ids=lambda case: case.name)
def test_gradients_and_updates_equal_one_process(ranks, case):
    answers = ranks(case.ranks)(on_ranks, case)
    _, problems = verdict(case, answers, one_process(case))
    assert not problems


def test_the_cases_cover_every_possible_pair_and_triple():
    for cases, values, strength in ((pairs(), PAIR_VALUES, 2), (triples(), TRIPLE_VALUES, 3)):
        assert len({case.name for case in cases}) == len(cases)
        assert not any(case.problem() for case in cases)
        assert not missing(cases, values, strength)


def test_the_shipped_table_has_every_case():
    shipped = json.loads(PATH.read_text())["cases"]
    wanted = [case for case in triples() if case.dropout != "drawn"]
    assert len(shipped) == len(wanted)
    for case in wanted:
        words = {factor: case.words[factor] for factor in (*FACTORS, *OPEN)}
        assert {**words, "ranks": case.ranks, "dp": case.dp} in shipped, case.name


@pytest.mark.release
def test_the_shipped_table_was_measured_on_this_code():
    """`make matrix` measures it again. Comments and docstrings do not count."""
    outdated, lines = outdated_lines()
    assert lines
    assert not outdated, f"{outdated} of {lines} lines are of other code"


def test_a_combination_whose_own_case_failed_is_refused_even_if_all_its_triples_passed():
    cases = [case for case in triples() if case.dropout != "drawn" and case.tp != "8"]
    passed = [{"name": case.name, "verdict": "passed"} for case in cases]
    victim, other = cases[3], cases[4]
    table = ProvenTable(proven([*passed, {"name": victim.name, "verdict": "failed"}]))
    assert not table.proves({factor: victim.words[factor] for factor in FACTORS})
    assert table.proves({factor: other.words[factor] for factor in FACTORS})


def test_a_case_and_its_name_and_its_run_file_have_the_same_factors():
    for case in triples():
        assert GradientCase.named(case.name) == case
        words = factors(case.config())
        assert words == {
            key: {"drawn": "on"}.get(case.words[key], case.words[key]) for key in words
        }


def test_the_ranks_split_the_rows_of_a_step_for_any_number_of_ranks():
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
