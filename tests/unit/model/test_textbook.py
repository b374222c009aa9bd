"""The whole model against formulas: explicit scores, explicit means, one token at a time in mind."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.tiny_model import VARIANTS, VOCAB, config, random_batch, tiny


class Textbook:
    """Logits from a dictionary of weights and the config alone; no module of lmscale."""

    def __init__(self, cfg, weights):
        self.cfg, self.weights = cfg, weights

    def logits(self, stream):
        x = self.weights["decoder.embedding.weight"][stream.tokens_BL]
        if self.cfg.positions == "learned":
            x = x + self.weights["decoder.positions.weight"][stream.positions_BL]
        for n in range(self.cfg.num_layers):
            at = f"decoder.blocks.{n}."
            if self.cfg.norm_order == "pre":
                x = x + self.attention(self.norm(x, at + "norm_attention"), at, stream)
                x = x + self.feed_forward(self.norm(x, at + "norm_feed_forward"), at)
            else:
                x = self.norm(x + self.attention(x, at, stream), at + "norm_attention")
                x = self.norm(x + self.feed_forward(x, at), at + "norm_feed_forward")
        if self.cfg.norm_order == "pre":
            x = self.norm(x, "decoder.norm")
        head = "decoder.embedding.weight" if self.cfg.tie_embeddings else "heads.lm.weight"
        return x @ self.weights[head][:VOCAB].T

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0)

    def norm(self, x, name):
        if self.cfg.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + self.cfg.norm_eps).sqrt()
        return x / scale * self.weights[name + ".weight"] + self.weights.get(name + ".bias", 0)

    def feed_forward(self, x, at):
        at += "feed_forward."
        up = self.linear(x, at + "up")
        match self.cfg.activation:
            case "swiglu":
                gate = self.linear(x, at + "gate")
                up = up * gate / (1 + (-gate).exp())
            case "gelu":
                up = up * (1 + torch.erf(up / math.sqrt(2))) / 2
            case "relu":
                up = up.clamp(min=0)
        return self.linear(up, at + "down")

    def attention(self, x, at, stream):
        at += "attention."
        heads = [self.linear(x, at + n).unflatten(-1, (-1, self.cfg.head_dim)) for n in "qkv"]
        q, k, v = heads
        if self.cfg.positions == "rotary":
            q, k = self.rotate(q, stream.positions_BL), self.rotate(k, stream.positions_BL)
        repeat = self.cfg.num_heads // self.cfg.num_kv_heads
        k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
        scores = torch.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(self.cfg.head_dim)
        length = x.shape[1]
        for b in range(len(x)):
            for i in range(length):
                for j in range(length):
                    other = stream.documents_BL[b, i] != stream.documents_BL[b, j]
                    if j > i or other:
                        scores[b, :, i, j] = float("-inf")
        y = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), v)
        return self.linear(y.flatten(-2), at + "out")

    def rotate(self, x, positions_BL):
        half = self.cfg.head_dim // 2
        out = x.clone()
        for i in range(half):
            frequency = self.cfg.rope_theta ** (-2 * i / self.cfg.head_dim)
            angle = positions_BL.double()[..., None] * frequency
            a, b = x[..., i], x[..., i + half]
            out[..., i] = a * angle.cos() - b * angle.sin()
            out[..., i + half] = a * angle.sin() + b * angle.cos()
        return out


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_loss_are_the_textbooks(changes):
    model, batch = tiny(**changes), random_batch(2, 7)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():  # biases and norms start at 0 and 1, where mistakes hide
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=g)
                parameter.add_(noise, alpha=0.3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    want = Textbook(config(**changes), weights).logits(batch.inputs)
    torch.testing.assert_close(model.logits(batch), want, rtol=0, atol=1e-12)
    nats = F.cross_entropy(want.flatten(0, 1), batch.targets_BL.flatten(), reduction="none")
    sums = model(batch)
    torch.testing.assert_close(sums.loss, (nats * batch.weights_BL.flatten()).sum())
    assert sums.weight == batch.weights_BL.sum()
