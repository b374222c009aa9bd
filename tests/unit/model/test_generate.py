"""Generated tokens are the model's own choices."""

import pytest
import torch

from lmscale.base.errors import UsageError
from lmscale.model.generate import _choose, generate
from tests.support.tiny_model import POSITIONS, VARIANTS, VOCAB, row, tiny

PROMPT = [3, 14, 15, 9]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_greedy_is_the_argmax_of_each_prefix(changes):
    model = tiny(**changes)
    new = generate(model, PROMPT, max_new=6)
    # One forward over the whole result: causality makes its logits those of each prefix.
    logits_V = model.next_logits(row(PROMPT + new), slice(len(PROMPT) - 1, -1))[0]
    assert new == logits_V.argmax(-1).tolist()


def test_eos_ends_and_is_returned():
    model = tiny()
    free = generate(model, PROMPT, max_new=6)
    stop = free[2]
    assert generate(model, PROMPT, max_new=6, eos=stop) == free[: free.index(stop) + 1]


def test_a_seed_decides_and_top_1_is_greedy():
    model = tiny()
    draws = [generate(model, PROMPT, max_new=8, temperature=2.0, seed=s) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    greedy = generate(model, PROMPT, max_new=8)
    assert generate(model, PROMPT, max_new=8, temperature=2.0, top_k=1) == greedy
    assert all(0 <= token < VOCAB for draw in draws for token in draw)


def test_sampling_follows_the_softmax():
    g = torch.Generator().manual_seed(0)
    logits_V = torch.tensor([1.0, 0.0, 2.0, -1.0])
    draws = [_choose(logits_V, temperature=2.0, top_k=3, generator=g) for _ in range(3000)]
    seen = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    want = torch.softmax(torch.tensor([1.0, 0.0, 2.0, float("-inf")]) / 2, 0)
    torch.testing.assert_close(seen, want, rtol=0, atol=0.03)
    assert seen[3] == 0


def test_dropout_is_off_and_the_mode_comes_back():
    model = tiny(dropout=0.5)
    assert generate(model, PROMPT, max_new=5) == generate(tiny(), PROMPT, max_new=5)
    assert model.training


def test_zero_new_tokens_generate_nothing():
    assert generate(tiny(), PROMPT, max_new=0) == []


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "no token"),
        ([VOCAB], {}, f"token {VOCAB} of the prompt"),
        ([-1], {}, "token -1"),
        (PROMPT, {"temperature": -1.0}, "temperature -1"),
        (PROMPT, {"top_k": 0, "temperature": 1.0}, "top_k 0"),
        (PROMPT, {"max_new": POSITIONS - 2}, f"{POSITIONS} positions"),
    ],
)
def test_impossible_requests_are_named(prompt, changes, message):
    model = tiny(positions="learned")
    with pytest.raises(UsageError, match=message):
        generate(model, prompt, **{"max_new": 3, **changes})


def test_learned_positions_are_used_to_the_last():
    model = tiny(positions="learned")
    assert len(generate(model, PROMPT, max_new=POSITIONS - 3)) == POSITIONS - 3
