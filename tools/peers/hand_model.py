"""A Llama-style decoder as one writes it by hand: torch's own layers, all logits at once.

Shapes: B rows, L tokens, D width, N heads, H head size. Names are lmscale's, so that weights load as they are.
"""

import torch
import torch.nn.functional as F
from task import Task
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.heads = task.heads
        for name in ("q", "k", "v", "out"):
            setattr(self, name, nn.Linear(task.width, task.width, bias=False))

    def forward(self, x_BLD: Tensor, cos_LH: Tensor, sin_LH: Tensor) -> Tensor:
        split = (self.heads, -1)
        q_BNLH, k_BNLH, v_BNLH = (
            part(x_BLD).unflatten(-1, split).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        q_BNLH, k_BNLH = rotate(q_BNLH, cos_LH, sin_LH), rotate(k_BNLH, cos_LH, sin_LH)
        y_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH, is_causal=True)
        return self.out(y_BNLH.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.gate = nn.Linear(task.width, task.feed_forward, bias=False)
        self.up = nn.Linear(task.width, task.feed_forward, bias=False)
        self.down = nn.Linear(task.feed_forward, task.width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BLD)) * self.up(x_BLD))


class Block(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(task.width, eps=task.norm_eps)
        self.attention = Attention(task)
        self.norm_feed_forward = nn.RMSNorm(task.width, eps=task.norm_eps)
        self.feed_forward = FeedForward(task)

    def forward(self, x_BLD: Tensor, cos_LH: Tensor, sin_LH: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm_attention(x_BLD), cos_LH, sin_LH)
        return x_BLD + self.feed_forward(self.norm_feed_forward(x_BLD))


class Decoder(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocab, task.width)
        self.blocks = nn.ModuleList(Block(task) for _ in range(task.layers))
        self.norm = nn.RMSNorm(task.width, eps=task.norm_eps)


class HandModel(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.decoder = Decoder(task)
        self.heads = nn.ModuleDict({"lm": nn.Linear(task.width, task.vocab, bias=False)})
        self._angles = angles(task)  # no buffers: a model's cast to bf16 shall not reach them
        self.load_state_dict(task.weights())

    def forward(self, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Mean loss, in nats."""
        x_BLD = self.decoder.embedding(tokens_BL)
        cos_LH, sin_LH = (table.to(x_BLD.dtype) for table in self._angles)
        for block in self.decoder.blocks:
            x_BLD = block(x_BLD, cos_LH, sin_LH)
        logits_BLV = self.heads["lm"](self.decoder.norm(x_BLD))
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())


def angles(task: Task) -> tuple[Tensor, Tensor]:
    """Cosines and sines of Llama's rotary positions (halves, not pairs)."""
    head_dim = task.width // task.heads
    speeds = task.rope_theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    turns_LH = (torch.arange(task.length).float()[:, None] * speeds).repeat(1, 2)
    return turns_LH.cos(), turns_LH.sin()


def rotate(x_BNLH: Tensor, cos_LH: Tensor, sin_LH: Tensor) -> Tensor:
    first, second = x_BNLH.chunk(2, -1)
    return x_BNLH * cos_LH + torch.cat([-second, first], -1) * sin_LH
