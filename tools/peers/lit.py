"""litgpt's model in the loop of litgpt's pretrain.py, under Lightning Fabric, without its log lines."""

from typing import Any

import torch
from lightning.fabric import Fabric
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from task import Pace, Task

_NAMES = {
    "norm_attention": "norm_1",
    "attention.out": "attn.proj",
    "norm_feed_forward": "norm_2",
    "feed_forward.gate": "mlp.fc_1",
    "feed_forward.up": "mlp.fc_2",
    "feed_forward.down": "mlp.proj",
}


def run(task: Task, pace: Pace) -> None:
    """bf16 is bf16-mixed: bf16-true would update bf16 weights, which is less work and another result."""
    precision = "bf16-mixed" if task.precision == "bf16" else "32-true"
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = fabric.setup(_model(task))
    groups = task.groups(model.named_parameters())
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(groups, lr=task.lr, betas=task.betas, eps=task.eps, fused=True)
    )
    pace.wait()
    for tokens, targets in task.batches():
        loss = chunked_cross_entropy(model(tokens), targets)
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=task.clip)
        optimizer.step()
        optimizer.zero_grad()
        pace.done(loss.detach(), norm)


def _model(task: Task) -> GPT:
    config = Config(
        name="bench",
        block_size=task.length,
        n_layer=task.layers,
        n_embd=task.width,
        n_head=task.heads,
        padded_vocab_size=task.vocab,
        intermediate_size=task.feed_forward,
        mlp_class_name="LLaMAMLP",
        norm_class_name="RMSNorm",
        norm_eps=task.norm_eps,
        rotary_percentage=1.0,
        rope_base=int(task.rope_theta),
        parallel_residual=False,
        bias=False,
    )
    model = GPT(config)
    model.load_state_dict(_theirs(task))
    return model


def _theirs(task: Task) -> dict[str, Any]:
    ours = task.weights()
    found = {
        "transformer.wte.weight": ours["decoder.embedding.weight"],
        "transformer.ln_f.weight": ours["decoder.norm.weight"],
        "lm_head.weight": ours["heads.lm.weight"],
    }
    for number in range(task.layers):
        here, there = f"decoder.blocks.{number}", f"transformer.h.{number}"
        qkv = [ours[f"{here}.attention.{letter}.weight"] for letter in "qkv"]
        found[f"{there}.attn.qkv.weight"] = torch.cat(qkv)
        for name, theirs in _NAMES.items():
            found[f"{there}.{theirs}.weight"] = ours[f"{here}.{name}.weight"]
    return found
