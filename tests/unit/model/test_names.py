"""The names that checkpoints, importers and tensor parallelism rely on."""

from fnmatch import fnmatchcase

import pytest

from lmscale.modelspec.spec import padded_vocab_size
from lmscale.modelspec.tensor_parallel import PARALLEL_REGIONS, TP_STYLES, tp_style
from tests.support.tiny_model import VARIANTS, random_batch, tiny

LLAMA = {
    "decoder.embedding.weight": (128, 16),
    "decoder.blocks.0.norm_attention.weight": (16,),
    "decoder.blocks.0.attention.q.weight": (24, 16),
    "decoder.blocks.0.attention.k.weight": (12, 16),
    "decoder.blocks.0.attention.v.weight": (12, 16),
    "decoder.blocks.0.attention.out.weight": (16, 24),
    "decoder.blocks.0.norm_feed_forward.weight": (16,),
    "decoder.blocks.0.feed_forward.gate.weight": (24, 16),
    "decoder.blocks.0.feed_forward.up.weight": (24, 16),
    "decoder.blocks.0.feed_forward.down.weight": (16, 24),
    "decoder.norm.weight": (16,),
    "heads.lm.weight": (128, 16),
}
GPT2 = {
    "decoder.embedding.weight",
    "decoder.positions.weight",
    *(
        f"decoder.blocks.0.{module}.{kind}"
        for kind in ("weight", "bias")
        for module in (
            "norm_attention",
            *(f"attention.{x}" for x in ("q", "k", "v", "out")),
            "norm_feed_forward",
            "feed_forward.up",
            "feed_forward.down",
        )
    ),
    "decoder.norm.weight",
    "decoder.norm.bias",
}


def test_llama_like_names_and_shapes():
    model = tiny(num_layers=1, num_kv_heads=2, head_dim=6)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == LLAMA


def test_gpt2_like_names():
    assert set(dict(tiny(num_layers=1, **VARIANTS["gpt2"]).named_parameters())) == GPT2


def test_post_norm_ends_without_a_norm():
    assert "decoder.norm.weight" not in dict(tiny(norm_order="post").named_parameters())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_model_has_no_buffers(changes):
    """No buffer: everything that a checkpoint must contain is a parameter, and `to_empty` loses nothing."""
    assert not list(tiny(**changes).buffers())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_has_one_tensor_parallel_style(changes):
    for name, _ in tiny(**changes).named_parameters():
        tp_style(name)


def test_every_tensor_parallel_style_is_of_a_module():
    names = {
        name for changes in VARIANTS.values() for name, _ in tiny(**changes).named_modules() if name
    }
    for pattern in TP_STYLES:
        assert any(fnmatchcase(name, pattern) for name in names), pattern


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_modules_that_may_be_split_are_called_as_modules(changes):
    """A pass replaces forward on these instances; code that reads a weight past it would compute the whole model.

    A tied head reads the embedding's weight, which it is given as an argument.
    """
    model, batch = tiny(**changes), random_batch(2, 5)
    wanted = {
        name
        for name, _ in model.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in (*TP_STYLES, *PARALLEL_REGIONS))
    }
    called = set()

    def recording(name, forward):
        def run(*args):
            called.add(name)
            return forward(*args)

        return run

    for name in wanted:
        module = model.get_submodule(name)
        module.forward = recording(name, module.forward)
    model.heads["lm"].logits = recording("logits", model.heads["lm"].logits)
    model(batch)
    assert called == wanted
    model.logits(batch)
    assert called == wanted | {"logits"}


def test_vocabulary_is_padded_to_a_multiple_of_128():
    padded = [padded_vocab_size(size) for size in (1, 127, 128, 129, 50257)]
    assert padded == [128, 128, 128, 256, 50304]
