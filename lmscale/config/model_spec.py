"""From the flat keys of `model.*` to the specification that the model and the planner use."""

from lmscale.config.schema import ModelConfig
from lmscale.modelspec.spec import (
    AttentionSpec,
    BlockSpec,
    FeedForwardSpec,
    HeadSpec,
    ModelSpec,
    NormSpec,
    StackSpec,
)


def decoder_spec(cfg: ModelConfig, *, vocab_size: int, max_positions: int) -> ModelSpec:
    """A decoder with a language-model head.

    vocab_size: ids that the tokenizer can produce. max_positions: where model.max_positions is null, usually the
    length of a row.
    """
    attention = AttentionSpec(
        num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        bias=cfg.bias,
    )
    feed_forward = FeedForwardSpec(
        kind=cfg.activation, hidden_size=cfg.ffn_hidden_size, bias=cfg.bias
    )
    norm = NormSpec(kind=cfg.norm, eps=cfg.norm_eps, bias=cfg.bias)
    decoder = StackSpec(
        name="decoder",
        vocab_size=vocab_size,
        hidden_size=cfg.hidden_size,
        num_layers=cfg.num_layers,
        block=BlockSpec(
            attention=attention,
            feed_forward=feed_forward,
            norm=norm,
            norm_order=cfg.norm_order,
        ),
        positions=cfg.positions,
        max_positions=cfg.max_positions or max_positions,
        rope_theta=cfg.rope_theta,
        dropout=cfg.dropout,
    )
    return ModelSpec(
        stacks=(decoder,),
        heads=(HeadSpec(name="lm", stack="decoder", tied=cfg.tie_embeddings),),
        init_std=cfg.init_std,
        trainable=cfg.trainable,
    )
