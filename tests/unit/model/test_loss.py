"""The chunked loss is the textbook's, its gradient too, and it is a sum whatever the split."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmscale.model import loss as loss_module
from lmscale.model.loss import cross_entropy
from tests.support.tiny_model import VOCAB, gradients, random_batch, take, tiny

TOKENS, WIDTH = 37, 8


@pytest.fixture(params=[1, 10 * VOCAB, 1 << 22], ids=["chunk 5", "chunk 10", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_LOGITS, "cpu", request.param)
    monkeypatch.setattr(loss_module, "_CHUNK_MIN_TOKENS", 5)


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(TOKENS, WIDTH, generator=g).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCAB, WIDTH, generator=g).to(dtype).requires_grad_()
    targets_T = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    weights_T = torch.rand(TOKENS, generator=g)
    weights_T[::4] = 0
    return hidden_TD, weight_VD, targets_T, weights_T


def textbook(hidden_TD, weight_VD, targets_T, weights_T):
    nats_T = F.cross_entropy(F.linear(hidden_TD, weight_VD), targets_T, reduction="none")
    return (nats_T * weights_T).sum()


@pytest.mark.usefixtures("chunks")
def test_loss_and_gradients_are_the_textbooks():
    ours, theirs = inputs(), inputs()
    sums, want = cross_entropy(*ours), textbook(*theirs)
    (sums.loss * 3).backward()
    (want * 3).backward()
    torch.testing.assert_close(sums.loss, want)
    torch.testing.assert_close(sums.weight, theirs[3].sum(dtype=torch.float64))
    for got, expected in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("chunks")
def test_gradient_by_finite_differences():
    hidden_TD, weight_VD, targets_T, weights_T = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: cross_entropy(h, w, targets_T, weights_T).loss,
        (hidden_TD, weight_VD),
        fast_mode=True,
    )


@pytest.mark.parametrize("strange", [-1, -100, VOCAB, 10**9])
def test_a_target_of_weight_zero_may_be_anything(strange):
    hidden_TD, weight_VD, targets_T, weights_T = inputs()
    want = cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)
    want.loss.backward()
    other_TD, other_VD = inputs()[:2]
    got = cross_entropy(other_TD, other_VD, targets_T.where(weights_T > 0, strange), weights_T)
    got.loss.backward()
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(other_TD.grad, hidden_TD.grad)
    assert (hidden_TD.grad[weights_T == 0] == 0).all()


def test_no_targets_at_all_is_zero_not_nan():
    hidden_TD, weight_VD, targets_T, weights_T = inputs()
    sums = cross_entropy(hidden_TD, weight_VD, targets_T, torch.zeros_like(weights_T))
    sums.loss.backward()
    assert sums.loss == 0
    assert sums.weight == 0
    assert (weight_VD.grad == 0).all()


def test_huge_logits_stay_finite():
    hidden_TD, weight_VD, targets_T, weights_T = inputs(torch.float32)
    sums = cross_entropy(hidden_TD * 1e4, weight_VD, targets_T, weights_T)
    sums.loss.backward()
    assert sums.loss.isfinite()
    assert weight_VD.grad.isfinite().all()


@pytest.mark.usefixtures("chunks")
def test_bf16_weights_still_sum_in_fp32():
    low, exact = inputs(torch.bfloat16), inputs(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in exact[:2]] + list(exact[2:])
    got, want = cross_entropy(*low), textbook(*exact)
    got.loss.backward()
    want.backward()
    assert got.loss.dtype == torch.float64
    torch.testing.assert_close(got.loss, want, rtol=2e-3, atol=0)  # the logits are bf16
    for mine, theirs in zip(low[:2], exact[:2], strict=True):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0.03, atol=0.02)


def test_autocast_gives_gradients_of_the_parameters_dtype():
    ours, theirs = inputs(torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = cross_entropy(*ours)
    sums.loss.backward()
    textbook(*theirs).backward()
    for got, want in zip(ours[:2], theirs[:2], strict=True):
        assert got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad, want.grad, rtol=0.05, atol=0.03)


def test_only_required_gradients_are_computed():
    hidden_TD, weight_VD, targets_T, weights_T = inputs()
    cross_entropy(hidden_TD, weight_VD.detach(), targets_T, weights_T).loss.backward()
    assert hidden_TD.grad is not None
    with torch.no_grad():
        sums = cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)
    assert not sums.loss.requires_grad


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operator has made, in elements, the gradients' included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_all_logits_are_never_stored_at_once(monkeypatch):
    """By each operator's result, and by what the allocator says of both passes together."""
    tokens, width, vocab, chunk = 1000, 8, 512, 50
    monkeypatch.setitem(loss_module._CHUNK_LOGITS, "cpu", chunk * vocab)
    monkeypatch.setattr(loss_module, "_CHUNK_MIN_TOKENS", 1)
    hidden_TD = torch.randn(tokens, width, requires_grad=True)
    weight_VD = torch.randn(vocab, width, requires_grad=True)
    targets_T, weights_T = torch.randint(0, vocab, (tokens,)), torch.ones(tokens)

    def both_passes(loss):
        with (
            LargestTensor() as largest,
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
        ):
            loss().backward()
        held = peak = 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return largest.elements, peak

    arguments = hidden_TD, weight_VD, targets_T, weights_T
    elements, peak = both_passes(lambda: cross_entropy(*arguments).loss)
    assert elements == chunk * vocab
    assert peak < 1.6 * chunk * vocab * 4  # one chunk, and the gradients
    elements, peak = both_passes(lambda: textbook(*arguments))
    assert elements == tokens * vocab, "the measurement does not see all logits where they are"
    assert peak >= tokens * vocab * 4


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("padding", [1, 13, 200])
def test_rows_of_padding_change_nothing_and_get_no_gradient(padding):
    hidden_TD, weight_VD, targets_T, weights_T = inputs()
    want = cross_entropy(hidden_TD, weight_VD, targets_T, weights_T).loss
    want.backward()
    other_TD = hidden_TD.detach().clone().requires_grad_()
    more_PD = torch.full((VOCAB + padding, WIDTH), 1e9, dtype=torch.float64)
    more_PD[:VOCAB] = weight_VD.detach()
    more_PD.requires_grad_()
    got = cross_entropy(other_TD, more_PD, targets_T, weights_T, vocab_size=VOCAB).loss
    got.backward()
    # Products of another width add in another order, as do chunks of another number of tokens.
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    torch.testing.assert_close(other_TD.grad, hidden_TD.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(more_PD.grad[:VOCAB], weight_VD.grad, rtol=1e-12, atol=1e-14)
    assert not more_PD.grad[VOCAB:].any()


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 6), max_size=4), seed=st.integers(0, 9))
def test_sums_add_up_over_any_split_of_the_rows(cuts, seed):
    model, batch = tiny(), random_batch(6, 8, seed=seed)
    edges = [0, *sorted(cuts), 6]
    parts = [slice(a, b) for a, b in pairwise(edges) if a < b]
    whole = model(batch)
    sums = [model(take(batch, rows)) for rows in parts]
    torch.testing.assert_close(sum(s.loss for s in sums), whole.loss, rtol=1e-13, atol=0)
    assert sum(s.weight for s in sums) == whole.weight
    want = gradients(model, batch)
    split = [gradients(model, take(batch, rows)) for rows in parts]
    for name, gradient in want.items():
        torch.testing.assert_close(sum(g[name] for g in split), gradient, rtol=0, atol=1e-12)
