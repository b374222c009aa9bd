"""Parameters by formula against the model that is really built."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.model_spec import decoder_spec
from lmscale.config.schema import ModelConfig
from lmscale.config.yaml import parse
from lmscale.model.build import build_model
from lmscale.model.layers import FEED_FORWARD_CLASSES
from lmscale.model.transformer import LanguageModel
from lmscale.modelspec.feed_forward import FEED_FORWARDS
from lmscale.modelspec.parameters import ParameterSpec, num_elements, parameters, trainable
from lmscale.modelspec.tensor_parallel import tp_dim

MODELS = Path(__file__).parents[3] / "configs" / "models"
PUBLISHED = {
    "gpt2-124m": (50_257, 124_439_808),
    "llama-1b": (128_256, 1_235_814_400),
    "llama-7b": (32_000, 6_738_415_616),
    "llama-13b": (32_000, 13_015_864_320),
    "llama-70b": (32_000, 68_976_648_192),
}


def config(name: str) -> ModelConfig:
    values = parse((MODELS / f"{name}.yaml").read_text(), name="yaml").value
    return ModelConfig(**{**values, "norm_eps": float(values.get("norm_eps", 1e-5))})


def built(model: ModelConfig, vocab: int, positions: int) -> LanguageModel:
    return build_model(model, vocab_size=vocab, max_positions=positions, device="meta")


def assert_equal(model: ModelConfig, vocab: int, positions: int) -> tuple[ParameterSpec, ...]:
    specs = parameters(decoder_spec(model, vocab_size=vocab, max_positions=positions))
    real = dict(built(model, vocab, positions).named_parameters())
    assert [(p.name, p.shape) for p in specs] == [(n, tuple(p.shape)) for n, p in real.items()]
    learning = {name for name, p in real.items() if p.requires_grad}
    assert {p.name for p in trainable(specs)} == learning
    return specs


@pytest.mark.parametrize("name", sorted(path.stem for path in MODELS.glob("*.yaml")))
def test_every_model_file_has_the_parameters_that_are_built(name: str) -> None:
    vocab, published = PUBLISHED.get(name, (4096, None))
    specs = assert_equal(config(name), vocab, 1024)
    if published is not None:
        rows = -(-vocab // 128) * 128 - vocab  # the published count has no padding
        tables = 1 if config(name).tie_embeddings else 2
        assert num_elements(specs) - tables * rows * config(name).hidden_size == published


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_models_have_the_parameters_that_are_built(data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from([1, 2, 4, 6]))
    width = heads * 2 * data.draw(st.integers(1, 5))
    model = ModelConfig(
        num_layers=data.draw(st.integers(1, 3)),
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=data.draw(st.sampled_from([None, 1, heads])),
        head_dim=data.draw(st.sampled_from([None, 4])),
        ffn_hidden_size=data.draw(st.sampled_from([None, 10])),
        norm=data.draw(st.sampled_from(["rms", "layer"])),
        norm_order=data.draw(st.sampled_from(["pre", "post"])),
        positions=data.draw(st.sampled_from(["rotary", "learned", "none"])),
        activation=data.draw(st.sampled_from(sorted(FEED_FORWARDS))),
        bias=data.draw(st.booleans()),
        tie_embeddings=data.draw(st.booleans()),
        trainable=data.draw(
            st.sampled_from([("*",), ("*.attention.*",), ("decoder.emb*", "*.up.*")])
        ),
    )
    assert_equal(model, data.draw(st.integers(1, 400)), data.draw(st.integers(1, 40)))


def test_a_tied_head_counts_once_and_the_vocabulary_is_padded() -> None:
    def size(**more: bool) -> int:
        model = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, **more)
        return num_elements(parameters(decoder_spec(model, vocab_size=130, max_positions=16)))

    assert size(tie_embeddings=False) - size(tie_embeddings=True) == 256 * 8


def test_slices_of_tensor_parallel_ranks_make_up_the_whole() -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, ffn_hidden_size=24, bias=True
    )
    for spec in parameters(decoder_spec(model, vocab_size=300, max_positions=8)):
        whole, dim = torch.empty(spec.shape), tp_dim(spec.name)
        parts = whole.tensor_split(2, dim) if dim is not None else (whole,)
        assert spec.tp_slice(2).shape == tuple(parts[0].shape), spec.name
        assert spec.tp_slice(1) is spec


def test_every_feed_forward_kind_has_a_class() -> None:
    assert FEED_FORWARD_CLASSES.keys() == FEED_FORWARDS.keys()


def test_matrices_decay_and_vectors_do_not() -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, norm="layer", bias=True)
    specs = parameters(decoder_spec(model, vocab_size=130, max_positions=16))
    assert {spec.name for spec in specs if not spec.decays} == {
        spec.name for spec in specs if spec.name.endswith(".bias") or ".norm" in spec.name
    }
