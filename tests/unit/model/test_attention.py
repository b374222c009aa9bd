"""Who sees whom: only the past, only the own document, and never the padding."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lmscale.base.batch import Batch, Stream
from lmscale.model.attention import (
    Rotation,
    attend,
    block_mask,
    causal_mask,
    for_each_query,
    on_device,
)
from tests.support.tiny_model import VARIANTS, VOCAB, random_batch, row, tiny

variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
documents = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=4
)


@variants
@pytest.mark.parametrize("packed", [False, True])
def test_the_future_never_changes_the_past(changes, packed):
    model = tiny(**changes)
    batch = random_batch(2, 12, documents=packed)
    before = model.logits(batch)
    for cut in (1, 6, 11):
        batch.inputs.tokens_BL[:, cut:] = (batch.inputs.tokens_BL[:, cut:] + 7) % VOCAB
        after = model.logits(batch)
        torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=0, atol=1e-13)
        assert not torch.equal(after[:, cut:], before[:, cut:])
        before = after


@variants
@settings(max_examples=8, deadline=None)
@given(documents=documents, pad=st.integers(0, 3))
def test_packed_documents_equal_the_documents_alone(changes, documents, pad):
    model = tiny(**changes)
    packed = model.next_logits(row(*documents, pad=pad), slice(None))[0]
    alone = torch.cat([model.next_logits(row(d), slice(None))[0] for d in documents])
    torch.testing.assert_close(packed[: len(alone)], alone, rtol=0, atol=1e-12)


@variants
@settings(max_examples=8, deadline=None)
@given(documents=documents, seed=st.integers(0, 99))
def test_another_document_never_changes_mine(changes, documents, seed):
    model = tiny(**changes)
    mine, others = seed % len(documents), [list(d) for d in documents]
    for index, document in enumerate(others):
        if index != mine:
            document[:] = [(token + 1 + seed) % VOCAB for token in document]
    start = sum(len(d) for d in documents[:mine])
    here = slice(start, start + len(documents[mine]))
    before = model.next_logits(row(*documents), here)
    after = model.next_logits(row(*others), here)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-13)


@variants
def test_one_document_per_row_needs_no_mask(changes):
    """The two code paths of a CPU agree: is_causal and an explicit mask."""
    model = tiny(**changes)
    plain = random_batch(3, 9, documents=False)
    masked = Stream(plain.inputs.tokens_BL, plain.inputs.positions_BL, torch.zeros(3, 9).long())
    torch.testing.assert_close(
        model.next_logits(masked, slice(None)), model.logits(plain), rtol=0, atol=1e-12
    )


@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_makes_no_nan_and_no_gradient(changes, dtype):
    model = tiny(dtype=dtype, **changes)
    padded = row([3, 1, 4], pad=5).map(lambda x: x.repeat(2, 1))
    padded.documents_BL[1] = -1  # a row that is nothing but filler
    weights_BL = (padded.documents_BL >= 0).float()
    targets_BL = torch.full_like(padded.tokens_BL, 2)
    model(Batch(padded, None, targets_BL, weights_BL, torch.tensor([0, -1]))).loss.backward()
    assert model.next_logits(padded, slice(None)).isfinite().all()
    alone = Batch(row([3, 1, 4]), None, targets_BL[:1, :3], torch.ones(1, 3), torch.tensor([0]))
    want = tiny(dtype=dtype, **changes)
    want(alone).loss.backward()
    for got, expected in zip(model.parameters(), want.parameters(), strict=True):
        assert got.grad.isfinite().all()
        if dtype == torch.float64:
            torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_grouped_heads_equal_repeated_heads(packed):
    grouped, full = tiny(num_kv_heads=2), tiny(num_kv_heads=4)
    weights = dict(grouped.named_parameters())
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            weight = weights[name]
            if ".attention.k." in name or ".attention.v." in name:
                weight = weight.view(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16)
            parameter.copy_(weight)
    batch = random_batch(2, 11, documents=packed)
    torch.testing.assert_close(grouped.logits(batch), full.logits(batch), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_follows_the_same_rule(kv_heads):
    """Unfused, on a CPU: the rule of the CUDA path. Its kernel is tested in tests/gpu."""
    documents_BL = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1, -1], [5, 5, 5, 5, 5, 5, 5, 5, 5]])
    g = torch.Generator().manual_seed(0)
    q_BLNH = torch.randn(2, 9, 4, 16, generator=g)
    k_BLKH, v_BLKH = torch.randn(2, 2, 9, kv_heads, 16, generator=g)
    want = attend(q_BLNH, k_BLKH, v_BLKH, causal_mask(documents_BL, 16, torch.float32))
    q_BNLH, k_BKLH, v_BKLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
    got = flex_attention(
        q_BNLH, k_BKLH, v_BKLH, block_mask=block_mask(documents_BL), enable_gqa=kv_heads != 4
    )
    torch.testing.assert_close(got.transpose(1, 2), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # the compiler takes 15 s
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_attention_within_documents_is_the_same():
    """As CUDA runs it where blocks are not compiled: mask and kernel are a graph each. A CPU has the forward only."""
    documents_BL = (torch.arange(300) // 70).expand(2, 300).contiguous()
    g = torch.Generator().manual_seed(0)
    q_BNLH = torch.randn(2, 4, 300, 16, generator=g)
    k_BKLH, v_BKLH = torch.randn(2, 2, 2, 300, 16, generator=g)
    want = attend(
        *(x.transpose(1, 2) for x in (q_BNLH, k_BKLH, v_BKLH)),
        causal_mask(documents_BL, 16, torch.float32),
    )
    mask = block_mask(documents_BL, make=on_device(create_block_mask))
    got = on_device(flex_attention)(q_BNLH, k_BKLH, v_BKLH, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got.transpose(1, 2), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_keys_equal_grouped_keys(masked):
    """What CUDA is given where its kernels know no groups, with its gradient."""
    g = torch.Generator().manual_seed(0)
    q_BNLH = torch.randn(2, 6, 9, 16, generator=g)
    few = torch.randn(2, 2, 2, 9, 16, generator=g, requires_grad=True)
    mask = torch.ones(9, 9, dtype=torch.bool).tril() if masked else None
    how = {"attn_mask": mask, "is_causal": mask is None}
    want = F.scaled_dot_product_attention(q_BNLH, *few, enable_gqa=True, **how)
    got = F.scaled_dot_product_attention(q_BNLH, *(for_each_query(x, 6) for x in few), **how)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.square().sum(), few)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)


def test_rotary_sees_only_distances():
    model = tiny()
    batch = random_batch(2, 10)
    moved = Stream(
        batch.inputs.tokens_BL, batch.inputs.positions_BL + 1000, batch.inputs.documents_BL
    )
    torch.testing.assert_close(
        model.next_logits(moved, slice(None)), model.logits(batch), rtol=0, atol=1e-10
    )
    flat = tiny(positions="none")
    assert not torch.allclose(flat.logits(batch), model.logits(batch), atol=1e-3)


def test_rotary_pairs_element_i_with_i_plus_half():
    """Llama's order on disk: an importer need not permute q and k."""
    x_BLNH = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    positions_BL = torch.tensor([[0, 5, 9]])
    rotation = Rotation(positions_BL, head_dim=8, theta=100.0, dtype=torch.float64)
    first, second = x_BLNH[..., :4], x_BLNH[..., 4:]
    angle = positions_BL[..., None, None] * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.polar(torch.ones_like(angle), angle) * torch.complex(first, second)
    torch.testing.assert_close(rotation(x_BLNH), torch.cat([turned.real, turned.imag], -1))


def test_rotary_angles_stay_fp32_in_a_bf16_model():
    positions_BL = torch.tensor([[4093]])
    x_BLNH = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    low = Rotation(positions_BL, head_dim=8, theta=1e4, dtype=torch.bfloat16)(x_BLNH)
    exact = Rotation(positions_BL, head_dim=8, theta=1e4, dtype=torch.float64)(x_BLNH.double())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, rtol=0, atol=0.01)
