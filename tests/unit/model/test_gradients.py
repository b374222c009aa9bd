"""Every kind of model: its gradients are the derivative of its loss, in true double precision."""

import pytest
import torch

from tests.support.tiny_model import VARIANTS, VOCAB, gradients, random_batch, tiny

variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@variants
def test_gradients_are_the_losss_slope(changes):
    """Along a random direction; a hidden downcast to fp32 would show as an error of 1e-3 and more."""
    model, batch = tiny(**changes), random_batch(3, 9)
    got = gradients(model, batch)
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        slope = []
        for eps in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=eps)
                slope.append(model(batch).loss / 2e-6)
                parameter.sub_(direction, alpha=eps)
        want = slope[0] - slope[1]
        torch.testing.assert_close((got[name] * direction).sum(), want, rtol=1e-6, atol=1e-6)


@variants
def test_fp32_is_close_to_fp64_and_starts_from_the_same_values(changes):
    batch = random_batch(3, 9)
    exact = gradients(tiny(**changes), batch)
    low = gradients(tiny(dtype=torch.float32, **changes), batch)
    for name, gradient in exact.items():
        torch.testing.assert_close(low[name].double(), gradient, rtol=1e-4, atol=1e-5)


@variants
def test_bf16_runs_and_its_sums_are_wide(changes):
    model, batch = tiny(dtype=torch.bfloat16, **changes), random_batch(3, 9)
    sums = model(batch)
    sums.loss.backward()
    assert sums.loss.dtype == sums.weight.dtype == torch.float64
    assert model.logits(batch).dtype == torch.float32
    want = tiny(**changes)(batch).loss
    torch.testing.assert_close(sums.loss, want, rtol=0.02, atol=0)


def test_tied_weights_are_one_parameter_that_gets_both_gradients():
    tied, untied = tiny(tie_embeddings=True), tiny(tie_embeddings=False)
    assert "heads.lm.weight" not in dict(tied.named_parameters())
    with torch.no_grad():
        untied.heads.lm.weight.copy_(untied.decoder.embedding.weight)
    batch = random_batch(3, 9)
    torch.testing.assert_close(tied(batch).loss, untied(batch).loss)
    one, two = gradients(tied, batch), gradients(untied, batch)
    both = two["decoder.embedding.weight"] + two["heads.lm.weight"]
    torch.testing.assert_close(one["decoder.embedding.weight"], both)


def test_vocabulary_padding_has_no_logit_and_no_gradient():
    for tied in (True, False):
        model, batch = tiny(tie_embeddings=tied), random_batch(3, 9)
        assert model.logits(batch).shape == (3, 9, VOCAB)
        before = model(batch).loss
        for name in ("decoder.embedding.weight", *(() if tied else ("heads.lm.weight",))):
            assert model.get_parameter(name).shape[0] == 128
            assert (gradients(model, batch)[name][VOCAB:] == 0).all()
            model.get_parameter(name).data[VOCAB:] = 1e6
        assert torch.equal(model(batch).loss, before)


def test_dropout_only_in_training_and_by_the_global_seed():
    model, plain, batch = tiny(dropout=0.5), tiny(), random_batch(3, 9)
    torch.manual_seed(3)
    first = model(batch).loss
    torch.manual_seed(3)
    assert torch.equal(model(batch).loss, first)
    assert not torch.equal(model(batch).loss, first)
    assert torch.equal(model.eval()(batch).loss, plain.eval()(batch).loss)


# Dynamo looks at .grad of a block's input, which is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("packed", [False, True])
def test_a_block_compiles_into_one_graph(packed):
    model, batch = tiny(num_kv_heads=2), random_batch(2, 9, documents=packed)
    want = gradients(model, batch)
    for block in model.decoder.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    got = gradients(model, batch)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-12)
