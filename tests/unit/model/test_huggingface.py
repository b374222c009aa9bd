"""The same weights in Hugging Face's models give the same logits, loss and gradients. No network: random weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lmscale.config.model_spec import decoder_spec
from lmscale.config.schema import ModelConfig
from lmscale.config.yaml import parse
from lmscale.model.build import num_parameters
from lmscale.model.transformer import LanguageModel
from tests.support.tiny_model import VOCAB, random_batch, tiny

CONFIGS = Path(__file__).parents[3] / "configs/models"
LENGTH = 24
TABLES = ("decoder.embedding.weight", "heads.lm.weight")
LLAMA = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "ffn_hidden_size": 48,
    "norm_eps": 1e-6,
}
GPT2 = {
    "num_layers": 3, "hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 128, "norm": "layer", "norm_eps": 1e-5,
    "positions": "learned", "max_positions": LENGTH, "activation": "gelu_tanh", "bias": True, "tie_embeddings": True,
}  # fmt: skip
CASES = {
    "llama": LLAMA,
    "llama, grouped": {**LLAMA, "num_kv_heads": 2, "rope_theta": 500_000.0},
    "llama, tied": {**LLAMA, "num_kv_heads": 1, "head_dim": 12, "tie_embeddings": True},
    "gpt2": GPT2,
    "gpt2, another width": {**GPT2, "ffn_hidden_size": 72, "norm_eps": 1e-3},
}
# Ours -> theirs; q, k, v of GPT-2 are thirds of one matrix. * is the number of a block.
LLAMA_NAMES = {
    "decoder.embedding": "model.embed_tokens",
    "decoder.norm": "model.norm",
    "heads.lm": "lm_head",
    "*.norm_attention": "model.layers.*.input_layernorm",
    "*.attention.q": "model.layers.*.self_attn.q_proj",
    "*.attention.k": "model.layers.*.self_attn.k_proj",
    "*.attention.v": "model.layers.*.self_attn.v_proj",
    "*.attention.out": "model.layers.*.self_attn.o_proj",
    "*.norm_feed_forward": "model.layers.*.post_attention_layernorm",
    "*.feed_forward.gate": "model.layers.*.mlp.gate_proj",
    "*.feed_forward.up": "model.layers.*.mlp.up_proj",
    "*.feed_forward.down": "model.layers.*.mlp.down_proj",
}
GPT2_NAMES = {
    "decoder.embedding": "transformer.wte",
    "decoder.positions": "transformer.wpe",
    "decoder.norm": "transformer.ln_f",
    "*.norm_attention": "transformer.h.*.ln_1",
    "*.attention.q": "transformer.h.*.attn.c_attn",
    "*.attention.k": "transformer.h.*.attn.c_attn",
    "*.attention.v": "transformer.h.*.attn.c_attn",
    "*.attention.out": "transformer.h.*.attn.c_proj",
    "*.norm_feed_forward": "transformer.h.*.ln_2",
    "*.feed_forward.up": "transformer.h.*.mlp.c_fc",
    "*.feed_forward.down": "transformer.h.*.mlp.c_proj",
}


def theirs(cfg: ModelConfig) -> nn.Module:
    if cfg.positions == "learned":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB, n_positions=LENGTH, n_embd=cfg.hidden_size, n_layer=cfg.num_layers,
                n_head=cfg.num_heads, n_inner=cfg.ffn_hidden_size, layer_norm_epsilon=cfg.norm_eps,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=cfg.hidden_size, intermediate_size=cfg.ffn_hidden_size,
            num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.num_kv_heads, head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            tie_word_embeddings=cfg.tie_embeddings, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def same_place(name: str, model: nn.Module, *, gradient: bool = False) -> Tensor:
    """Where the other model keeps this parameter of ours (or its gradient), as a view in our orientation."""
    gpt2 = isinstance(model, GPT2LMHeadModel)
    module, _, kind = name.rpartition(".")
    block = ""
    if module.startswith("decoder.blocks."):
        _, _, block, rest = module.split(".", 3)
        module = "*." + rest
    found = (GPT2_NAMES if gpt2 else LLAMA_NAMES)[module].replace("*", block)
    owner = model.get_submodule(found)
    value = getattr(owner, kind)
    value = value.grad if gradient else value.data
    if type(owner).__name__ == "Conv1D":  # y = x W + b
        value = value.t() if kind == "weight" else value
    if module[-1] in "qkv" and gpt2:
        value = value.chunk(3)["qkv".index(module[-1])]
    return value


def unpadded(name: str, value: Tensor) -> Tensor:
    return value[:VOCAB] if name in TABLES else value


def pair(changes: dict) -> tuple[LanguageModel, nn.Module]:
    ours = tiny(torch.float32, **changes)
    other = theirs(ModelConfig(**changes))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.ndim == 1:  # at 0 and 1, where they start, a mistake in one would not show
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
            same_place(name, other).copy_(unpadded(name, parameter))
    return ours, other


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_loss_and_gradients_are_hugging_faces(changes):
    ours, other = pair({"init_std": 0.1, **changes})
    sizes = [unpadded(name, p).numel() for name, p in ours.named_parameters()]
    assert sum(sizes) == sum(p.numel() for p in other.parameters())
    batch = random_batch(3, LENGTH, documents=False)
    # They shift: the label of token t + 1 is our target t, and what is not asked is -100.
    labels_BL = torch.full((3, LENGTH), -100)
    labels_BL[:, 1:] = batch.targets_BL.masked_fill(batch.weights_BL == 0, -100)[:, :-1]
    batch.weights_BL[:, -1] = 0
    found = other(input_ids=batch.inputs.tokens_BL, labels=labels_BL)
    logits = ours.logits(batch)
    assert logits.std() > 0.1, "nothing to compare"
    torch.testing.assert_close(logits, found.logits, rtol=0, atol=1e-5)
    sums = ours(batch)
    loss = sums.loss / sums.weight
    torch.testing.assert_close(loss.float(), found.loss, rtol=1e-6, atol=0)
    loss.backward()
    found.loss.backward()
    for name, parameter in ours.named_parameters():
        want = same_place(name, other, gradient=True)
        got = unpadded(name, parameter.grad)
        # The key bias has no gradient under softmax but rounding, so never by its own size alone.
        largest = want.abs().max().clamp(min=1e-3)
        assert (got - want).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_a_difference_would_show(eps):
    """The margin of these comparisons: a norm's eps, the smallest detail a model may have wrong."""
    ours, other = pair({**GPT2, "norm_eps": 1e-5, "init_std": 0.1})
    for module in ours.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    batch = random_batch(3, LENGTH, documents=False)
    found = other(input_ids=batch.inputs.tokens_BL).logits
    assert ((ours.logits(batch) - found).abs().max() < 1e-5) == (eps == 1e-5)


SHAPES = {
    "gpt2-124m": (50_257, 124_439_808, GPT2Config()),
    "llama-7b": (32_000, 6_738_415_616, LlamaConfig()),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_named_shape_is_the_model_of_that_name(name):
    """Every parameter of it, by Hugging Face's own defaults, which are these two models."""
    vocab, published, config = SHAPES[name]
    path = CONFIGS / f"{name}.yaml"
    cfg = ModelConfig(**parse(path.read_text(), name=path.name).value)
    with torch.device("meta"):
        ours = LanguageModel(decoder_spec(cfg, vocab_size=vocab, max_positions=1))
        other = (GPT2LMHeadModel if name.startswith("gpt2") else LlamaForCausalLM)(config)
    padding = (-vocab % 128) * cfg.hidden_size * (1 if cfg.tie_embeddings else 2)
    assert num_parameters(ours).total == published + padding
    assert sum(p.numel() for p in other.parameters()) == published
    for parameter, value in ours.named_parameters():
        there, found = tuple(same_place(parameter, other).shape), tuple(value.shape)
        if parameter in TABLES:
            found = (vocab, cfg.hidden_size)
        assert there == found, parameter
    activation = getattr(config, "activation_function", None) or config.hidden_act
    assert {"gelu_new": "gelu_tanh", "silu": "swiglu"}[activation] == cfg.activation
