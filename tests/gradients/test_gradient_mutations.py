"""Every bug that is planted in the product is seen: the case that it names is beyond its tolerance."""

import pytest

from tests.gradients.case import GradientCase
from tests.gradients.cover import pairs
from tests.gradients.mutations import BUGS, caught

# Ordered so that one pool of ranks after another is at work.
NAMES = sorted(BUGS, key=lambda name: GradientCase.named(BUGS[name].case).ranks)


@pytest.mark.slow  # a case each
@pytest.mark.parametrize("name", NAMES)
def test_a_planted_bug_is_caught(ranks, name):
    case = GradientCase.named(BUGS[name].case)
    assert caught(name, case, ranks(case.ranks)), f"{case.name} does not notice"


def test_bugs_name_cases_of_the_pairs():
    known = {case.name for case in pairs()}
    assert {bug.case for bug in BUGS.values()} <= known
