"""Initial values depend on seed, name and shape, and on nothing else."""

import pytest
import torch

from lmscale.base.errors import ConfigError
from lmscale.model.build import build_model
from lmscale.model.init import initial_value, initialise
from lmscale.modelspec.parameters import parameters
from tests.support.tiny_model import POSITIONS, VARIANTS, VOCAB, config, tiny

variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@variants
def test_every_parameter_is_its_initial_value(changes):
    model = tiny(dtype=torch.float32, seed=7, **changes)
    specs = {spec.name: spec for spec in parameters(model.spec)}
    for name, parameter in reversed(list(model.named_parameters())):
        want = initial_value(specs[name], seed=7)
        assert torch.equal(parameter, want), name


def test_shared_parts_of_different_models_start_equal():
    """Depth, tying and build order leave a parameter alone: only its name counts."""
    short = values(tiny(num_layers=2, tie_embeddings=True))
    long = values(tiny(num_layers=5, tie_embeddings=False))
    same = [n for n in short if not n.endswith(("out.weight", "down.weight"))]
    assert all(torch.equal(short[name], long[name]) for name in same)
    assert not torch.equal(
        long["decoder.blocks.0.attention.q.weight"], long["decoder.blocks.1.attention.q.weight"]
    )


def test_seeds_differ_and_fp64_starts_where_fp32_does():
    one, two = values(tiny(seed=1)), values(tiny(seed=2))
    assert not torch.equal(one["decoder.embedding.weight"], two["decoder.embedding.weight"])
    low = values(tiny(dtype=torch.float32, seed=1))
    assert all(torch.equal(low[name].double(), one[name]) for name in one)


def test_initial_values_of_a_seed_never_change():
    """A checkpoint of step 0 is not stored: changing these would change what a seed means."""
    model = tiny(dtype=torch.float32, seed=0)
    got = model.get_parameter("decoder.blocks.0.attention.q.weight")[0, :3].tolist()
    assert got == pytest.approx([0.0664163, -0.0403242, -0.0757955], rel=1e-5)


def test_meta_then_initialise_equals_built_in_place():
    want = values(tiny(dtype=torch.float32, seed=3))
    later = build_model(config(), vocab_size=VOCAB, max_positions=POSITIONS, device="meta", seed=9)
    assert all(p.is_meta for p in later.parameters())
    later.to_empty(device="cpu")
    initialise(later, seed=3)
    assert all(torch.equal(got, want[name]) for name, got in values(later).items())


def test_a_layout_may_write_only_its_part():
    parts = {}

    def write(parameter, value):
        assert parameter.shape == value.shape
        parts[id(parameter)] = value[: len(value) // 2]

    model = tiny(dtype=torch.float32)
    initialise(model, seed=0, write=write)
    for parameter in model.parameters():
        assert torch.equal(parts[id(parameter)], parameter[: len(parameter) // 2])


def test_residual_matrices_are_scaled_by_depth():
    model = tiny(num_layers=8, hidden_size=64, ffn_hidden_size=64, num_heads=4, init_std=0.1)
    scaled = 0.1 / (2 * 8) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            rows = parameter[:VOCAB] if "embedding" in name or "heads" in name else parameter
            assert rows.std().item() == pytest.approx(scaled if residual else 0.1, rel=0.06)


def test_padding_rows_are_zero_biases_zero_norms_one():
    model = tiny(**VARIANTS["gpt2"])
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all()
        elif ".norm" in name:
            assert (parameter == 1).all()
    assert (model.decoder.embedding.weight[VOCAB:] == 0).all()
    assert (model.decoder.embedding.weight[:VOCAB] != 0).any(1).all()


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    tiny()
    assert torch.equal(torch.rand(3), want)


def test_frozen_parameters_have_no_gradient():
    model = tiny(trainable=("heads.*", "decoder.blocks.1.*"))
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns
    assert all(name.startswith(("heads.", "decoder.blocks.1.")) for name in learns)
    assert len(learns) < len(list(model.parameters()))


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(ConfigError, match=r"model\.trainable: 'decoder\.block\.\*' matches no"):
        tiny(trainable=("*", "decoder.block.*"))
    with pytest.raises(ConfigError, match="nothing would train"):
        tiny(trainable=())
