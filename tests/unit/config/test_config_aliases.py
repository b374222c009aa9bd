"""Names of other projects and of earlier versions are refused with the key to use."""

from pathlib import Path

import pytest

from lmscale.base.errors import ConfigError
from lmscale.config.aliases import key_for
from lmscale.config.earlier_keys import EARLIER_KEYS
from lmscale.config.identity import kinds
from lmscale.config.run_file import load
from lmscale.config.yaml import render

LMSCALE_937E9F1 = dict(EARLIER_KEYS)
HUGGING_FACE = {
    "model.num_hidden_layers": "model.num_layers",
    "model.num_attention_heads": "model.num_heads",
    "model.num_key_value_heads": "model.num_kv_heads",
    "model.intermediate_size": "model.ffn_hidden_size",
    "model.max_position_embeddings": "model.max_positions",
    "model.tie_word_embeddings": "model.tie_embeddings",
    "model.rms_norm_eps": "model.norm_eps",
    "model.hidden_act": "model.activation",
    "model.initializer_range": "model.init_std",
    "model.attention_bias": "model.bias",
    "hidden_size": "model.hidden_size",
    "vocab_size": "model.vocab_size",
    "optim.learning_rate": "optim.lr",
    "train.learning_rate": "optim.lr",
    "learning_rate": "optim.lr",
    "optim.adam_epsilon": "optim.eps",
    "optim.lr_scheduler_type": "optim.schedule",
    "train.max_grad_norm": "optim.max_grad_norm",
    "train.max_steps": "train.steps",
    "train.num_train_epochs": "train.epochs",
    "train.per_device_train_batch_size": "train.micro_batch_size",
    "train.gradient_checkpointing": "engine.activation_checkpointing",
    "train.output_dir": "train.run_dir",
    "checkpoint.save_steps": "checkpoint.every_steps",
    "checkpoint.save_total_limit": "checkpoint.keep",
    "log.logging_steps": "log.every_steps",
}
MEGATRON = {
    "model.num-layers": "model.num_layers",
    "model.hidden-size": "model.hidden_size",
    "model.ffn-hidden-size": "model.ffn_hidden_size",
    "model.num-attention-heads": "model.num_heads",
    "model.num-query-groups": "model.num_kv_heads",
    "model.kv-channels": "model.head_dim",
    "model.rotary-base": "model.rope_theta",
    "model.seq-length": "train.seq_len",
    "seq-length": "train.seq_len",
    "train.global-batch-size": "train.global_batch_size",
    "train.micro-batch-size": "train.micro_batch_size",
    "train.train-iters": "train.steps",
    "parallel.tensor-model-parallel-size": "parallel.tp",
    "tensor-model-parallel-size": "parallel.tp",
    "parallel.sequence-parallel": "parallel.sequence_parallel",
    "lr": "optim.lr",
    "optim.min-lr": "optim.final_lr_frac",
    "optim.clip-grad": "optim.max_grad_norm",
    "optim.lr-decay-style": "optim.schedule",
    "optim.lr-warmup-iters": "optim.warmup_steps",
    "checkpoint.save-interval": "checkpoint.every_steps",
    "eval.eval-interval": "eval.every_steps",
}
TORCHTITAN_AND_OLMO = {
    "model.dim": "model.hidden_size",
    "model.d_model": "model.hidden_size",
    "model.n_layers": "model.num_layers",
    "model.n_heads": "model.num_heads",
    "model.n_kv_heads": "model.num_kv_heads",
    "model.weight_tying": "model.tie_embeddings",
    "parallel.tensor_parallel_degree": "parallel.tp",
    "parallel.data_parallel_shard_degree": "parallel.dp_shard",
    "parallel.data_parallel_replicate_degree": "parallel.dp_replicate",
    "train.local_batch_size": "train.micro_batch_size",
    "train.max_norm": "optim.max_grad_norm",
    "train.global_train_batch_size": "train.global_batch_size",
    "train.save_folder": "train.run_dir",
    "model.n_embd": "model.hidden_size",
    "model.n_layer": "model.num_layers",
    "train.block_size": "train.seq_len",
    "train.max_iters": "train.steps",
}
TABLE = {**LMSCALE_937E9F1, **HUGGING_FACE, **MEGATRON, **TORCHTITAN_AND_OLMO}


def file_with(names: dict[str, str]) -> str:
    tree: dict[str, dict[str, object] | object] = {
        "model": {}, "data": {"corpora": "corpus"}, "optim": {}, "train": {"steps": 10},
    }  # fmt: skip
    for name in names:
        section, dot, key = name.partition(".")
        if dot:
            values = tree.setdefault(section, {})
            assert isinstance(values, dict)
            values[key] = 1
        else:
            tree[name] = 1
    return render(tree)


def test_every_name_of_the_table_is_refused_with_our_key_and_all_together(tmp_path: Path) -> None:
    assert len(TABLE) >= 60
    (tmp_path / "r.yaml").write_text(file_with(TABLE))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "r.yaml")
    hints = {problem.path: problem.hint for problem in caught.value.problems}
    wrong = {
        name: hints.get(name)
        for name, key in TABLE.items()
        if not (hints.get(name) or "").startswith(f"rename it to {key}")
    }
    assert wrong == {}
    assert not [p for p in caught.value.problems if p.fact == "missing"], "they are only misnamed"


def test_an_override_with_another_name_is_refused_alike() -> None:
    with pytest.raises(ConfigError) as caught:
        load("smoke", ["parallel.shard=2", "n-layers=3"])
    hints = {problem.path: problem.hint for problem in caught.value.problems}
    assert hints["parallel.shard"] == "rename it to parallel.dp_shard"
    assert hints["n-layers"] == "rename it to model.num_layers"


def test_sections_of_other_projects_are_refused_with_ours_and_with_the_keys_inside(
    tmp_path: Path,
) -> None:
    (tmp_path / "r.yaml").write_text(
        "training: {seq_len: 128, max_steps: 10, global-batch-size: 8}\n"
        "optimizer: {lr: 1e-3, clip_grad: 1}\n"
        "model: llama-1b\n"
        "data: {corpora: [x]}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "r.yaml")
    assert {problem.path: problem.hint for problem in caught.value.problems} == {
        "training": "rename it to train",
        "training.max_steps": "rename it to train.steps",
        "training.global-batch-size": "rename it to train.global_batch_size",
        "optimizer": "rename it to optim",
        "optimizer.clip_grad": "rename it to optim.max_grad_norm",
    }


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train.gradient_accumulation_steps", "leave it out: a step has as many micro-batches"),
        ("parallel.pipeline_model_parallel_size", "lmscale has no pipeline parallelism"),
        ("optim.warmup_ratio", 'rename it to optim.warmup_steps, as a share of all steps in percent'),
        ("engine.bf16", "set engine.precision to bf16"),
    ],
)  # fmt: skip
def test_names_with_another_meaning_get_advice(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("smoke", [f"{name}=1"])
    (problem,) = caught.value.problems
    assert hint in problem.hint


def test_allow_change_names_the_key_of_today() -> None:
    with pytest.raises(ConfigError) as caught:
        load("smoke", ["train.allow_change=[optim.clip]"])
    (problem,) = caught.value.problems
    assert problem.hint == "rename it to optim.max_grad_norm"


def test_every_target_is_a_key_and_no_key_of_ours_is_an_alias_in_its_section() -> None:
    keys = kinds()
    assert {key_for(name.split(".")) for name in TABLE} - {None} <= keys.keys()
    assert not [key for key in keys if key_for(key.split(".")) not in (None, key)]
