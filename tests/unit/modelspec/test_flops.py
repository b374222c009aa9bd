"""The formula counts what torch's own counter counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmscale.model.build import num_parameters
from lmscale.modelspec.flops import flops_per_token, matrix_parameters
from tests.support.tiny_model import VARIANTS, VOCAB, random_batch, tiny

ROWS, LENGTH = 2, 16


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_formula_equals_the_counted_flops(changes):
    model, batch = tiny(**changes), random_batch(ROWS, LENGTH, documents=False)
    # The math kernel shows every product; flash kernels compute the scores again in the backward.
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(batch).loss.backward()
    formula = flops_per_token(model.spec, seq_len=LENGTH, causal=False)
    padding = (
        6 * (model.decoder.spec.padded_vocab_size - VOCAB) * model.decoder.spec.hidden_size
    )  # computed, and of no use
    assert counter.get_total_flops() == ROWS * LENGTH * (formula + padding)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_matrix_parameters_are_the_models_matrices(changes):
    model = tiny(**changes)
    tables = ("embedding", "positions", "heads")
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and not any(table in name for table in tables)
    )
    assert matrix_parameters(model.spec) == matrices + VOCAB * 16


def test_causal_convention_counts_the_keys_a_token_may_see():
    spec = tiny().spec
    decoder = spec.stack("decoder")
    keys = [token + 1 for token in range(LENGTH)]
    full = flops_per_token(spec, seq_len=LENGTH, causal=False)
    half = flops_per_token(spec, seq_len=LENGTH, causal=True)
    per_key = 12 * decoder.num_layers * decoder.hidden_size
    assert full - half == per_key * (LENGTH - sum(keys) / LENGTH)


def test_parameter_counts():
    model = tiny(trainable=("heads.*",))
    counts = num_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.trainable == 128 * 16
    assert counts.total - counts.non_embedding == 128 * 16
