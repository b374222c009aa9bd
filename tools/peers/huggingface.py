"""Hugging Face's Trainer around its Llama. Its own loop runs; a callback holds it between two steps."""

from collections.abc import Iterator
from typing import Any

import torch
from task import Pace, Task
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

_NAMES = {
    "norm_attention": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "norm_feed_forward": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_OUTER = {
    "decoder.embedding.weight": "model.embed_tokens.weight",
    "decoder.norm.weight": "model.norm.weight",
    "heads.lm.weight": "lm_head.weight",
}


def run(task: Task, pace: Pace) -> None:
    """options: compile (torch_compile of TrainingArguments)."""
    arguments = TrainingArguments(
        output_dir="unused",
        per_device_train_batch_size=task.rows,
        max_steps=1 << 30,
        learning_rate=task.lr,
        lr_scheduler_type="constant",
        weight_decay=task.weight_decay,
        adam_beta1=task.betas[0],
        adam_beta2=task.betas[1],
        adam_epsilon=task.eps,
        max_grad_norm=task.clip,
        optim="adamw_torch_fused",
        bf16=task.precision == "bf16",
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        torch_compile=bool(task.options.get("compile")),
    )
    trainer = Watched(
        model=_model(task), args=arguments, train_dataset=Rows(task), callbacks=[Hold(pace)]
    )
    trainer.train()


class Watched(Trainer):
    """Keeps loss and norm of the step where the callback finds them."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.state.last_loss = super().training_step(*args, **kwargs)
        return self.state.last_loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self.state.last_norm = super()._clip_grad_norm(model)
        return self.state.last_norm


class Hold(TrainerCallback):
    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pace.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pace.done(state.last_loss, state.last_norm)


class Rows(IterableDataset):
    """Row by row; Trainer collates. shift_labels: its own shift would leave out the last target of a row."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for tokens_BL, targets_BL in self._task.batches():
            for tokens_L, targets_L in zip(tokens_BL, targets_BL, strict=True):
                yield {"input_ids": tokens_L, "labels": targets_L, "shift_labels": targets_L}


def _model(task: Task) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=task.vocab,
        hidden_size=task.width,
        intermediate_size=task.feed_forward,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        num_key_value_heads=task.heads,
        max_position_embeddings=task.length,
        rms_norm_eps=task.norm_eps,
        rope_theta=task.rope_theta,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({_theirs(name): value for name, value in task.weights().items()})
    return model


def _theirs(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, _, number, rest = name.split(".", 3)
    return f"model.layers.{number}.{_NAMES[rest.removesuffix('.weight')]}.weight"
