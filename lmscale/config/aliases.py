"""Names that other projects, or earlier versions of lmscale, give to our keys: what to write instead.

A run file has one spelling: these names are refused, and the error names the key to use. Hyphens count as underscores
and capital letters as small ones. Values are not converted, so a note says where they mean something else here.
"""

from collections.abc import Mapping, Sequence

from lmscale.config.earlier_keys import EARLIER_KEYS

# Each of our keys with the names that it has elsewhere: Hugging Face and accelerate, Megatron-LM, torchtitan,
# OLMo-core, nanoGPT, litgpt and DeepSpeed.
_NAMES: Mapping[str, str] = {
    "model.num_layers": "num_hidden_layers n_layers n_layer num_blocks decoder_layers depth",
    "model.hidden_size": "dim d_model n_embd embed_dim hidden_dim model_dim emb_dim embedding_dim n_embed",
    "model.num_heads": "num_attention_heads n_heads n_head attention_heads num_query_heads",
    "model.num_kv_heads": "num_key_value_heads num_query_groups n_kv_heads n_kv_head n_query_groups",
    "model.head_dim": "kv_channels head_size d_head d_kv",
    "model.ffn_hidden_size": "intermediate_size ffn_dim n_inner d_ff mlp_dim mlp_hidden_size ff_dim",
    "model.vocab_size": "padded_vocab_size n_vocab padded_vocabulary_size",
    "model.max_positions": "max_position_embeddings n_positions n_ctx max_sequence_length",
    "model.norm": "normalization norm_type layer_norm_type norm_class_name",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon",
    "model.positions": "position_embedding_type pos_emb",
    "model.rope_theta": "rotary_base rope_base rotary_emb_base",
    "model.activation": "hidden_act activation_function activation_type hidden_activation act_fn",
    "model.bias": "biases use_bias add_bias_linear attention_bias mlp_bias include_bias",
    "model.tie_embeddings": "tie_word_embeddings tie_weights weight_tying tied_embeddings enable_weight_tying",
    "model.dropout": "hidden_dropout resid_pdrop embd_pdrop attention_dropout residual_dropout resid_dropout",
    "model.init_std": "initializer_range init_method_std",
    "data.corpora": "data_path dataset dataset_path train_data_path dataset_name train_file data_dir train_data",
    "data.tokenizer": "tokenizer_model tokenizer_path tokenizer_name tokenizer_name_or_path tokenizer_file",
    "data.prefetch_steps": "prefetch_factor",
    "parallel.tp": (
        "tensor_model_parallel_size tensor_parallel_degree tensor_parallel_size tp_size tp_degree tensor_parallel"
    ),
    "parallel.dp_shard": (
        "data_parallel_shard_degree dp_shard_degree fsdp_size dp_shard_size dp_shard_dim data_parallel_shard"
    ),
    "parallel.dp_replicate": (
        "data_parallel_replicate_degree dp_replicate_degree dp_replicate_size ddp_size data_parallel_replicate"
    ),
    "parallel.sequence_parallel": "sequence_parallelism enable_sequence_parallel",
    "engine.zero_stage": "stage zero_optimization_stage",
    "engine.offload": "cpu_offload offload_optimizer offload_params offload_param enable_cpu_offload",
    "engine.precision": "mixed_precision torch_dtype dtype mixed_precision_param",
    "engine.activation_checkpointing": (
        "gradient_checkpointing recompute_granularity activation_checkpoint checkpoint_activations"
    ),
    "engine.compile": "torch_compile torch_compile_mode compile_model",
    "engine.reshard_after_forward": "fsdp_reshard_after_forward fsdp_resharding",
    "optim.lr": "learning_rate max_lr peak_lr",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "optim.eps": "adam_epsilon adam_eps",
    "optim.weight_decay": "wd adam_weight_decay",
    "optim.max_grad_norm": "clip_grad grad_clip gradient_clipping max_norm gradient_clip_val clip_grad_norm",
    "optim.schedule": "lr_scheduler_type lr_decay_style lr_scheduler decay_type",
    "optim.warmup_steps": "num_warmup_steps lr_warmup_iters warmup_iters warmup_ratio lr_warmup_fraction",
    "optim.decay_steps": "lr_decay_iters lr_decay_steps lr_wsd_decay_iters decay_ratio wsd_decay_steps",
    "optim.final_lr_frac": "min_lr lr_min min_lr_ratio min_lr_factor alpha_f",
    "train.seq_len": "seq_length sequence_length block_size max_seq_len max_seq_length context_length",
    "train.global_batch_size": "train_batch_size global_train_batch_size batch_size",
    "train.micro_batch_size": (
        "per_device_train_batch_size local_batch_size device_batch_size train_micro_batch_size_per_gpu "
        "rank_microbatch_size device_train_microbatch_size"
    ),
    "train.steps": "max_steps train_iters max_iters num_steps training_steps total_steps num_training_steps",
    "train.tokens": "max_tokens train_tokens num_tokens total_tokens",
    "train.epochs": "num_train_epochs num_epochs max_epochs",
    "train.seed": "random_seed init_seed data_seed",
    "train.deterministic": "deterministic_mode full_determinism use_deterministic_algorithms",
    "train.run_dir": "output_dir save_folder dump_folder out_dir work_dir",
    "train.resume": "resume_from_checkpoint load_path",
    "train.init_from": "initial_load_path pretrained_checkpoint pretrained_model_name_or_path model_name_or_path",
    "eval.corpora": "valid_data_path validation_file eval_dataset test_data_path",
    "eval.every_steps": "eval_interval eval_steps val_check_interval eval_freq",
    "eval.max_samples": "max_eval_samples",
    "checkpoint.every_steps": "save_interval save_steps checkpoint_interval save_every",
    "checkpoint.keep": "save_total_limit keep_latest_k save_num_checkpoints_to_keep",
    "checkpoint.async": "async_save async_mode",
    "log.every_steps": "log_interval logging_steps log_freq",
    "log.trackers": "report_to enable_tensorboard enable_wandb",
    "cluster.nodes": "num_nodes nnodes num_machines",
    "cluster.ranks_per_node": "nproc_per_node ntasks_per_node num_processes",
    "cluster.gpus_per_node": "num_gpus gpus n_gpus_per_node",
    "cluster.time_limit": "timeout_min walltime timeout",
}
_KEYS: Mapping[str, str] = {
    name: key for key, names in _NAMES.items() for name in names.split()
} | {earlier.partition(".")[2]: key for earlier, key in EARLIER_KEYS.items()}
# Where the value of the other name means something else.
_NOTES: Mapping[str, str] = {
    "warmup_ratio": 'as a share of all steps in percent, e.g. "5%"',
    "lr_warmup_fraction": 'as a share of all steps in percent, e.g. "5%"',
    "decay_ratio": 'as a share of all steps in percent, e.g. "20%"',
    "min_lr": "as a share of optim.lr, e.g. 0.1",
    "lr_min": "as a share of optim.lr, e.g. 0.1",
    "adam_beta1": "as a pair, e.g. [0.9, 0.95]",
    "adam_beta2": "as a pair, e.g. [0.9, 0.95]",
    "beta1": "as a pair, e.g. [0.9, 0.95]",
    "beta2": "as a pair, e.g. [0.9, 0.95]",
    "gradient_checkpointing": "with the value full or none",
    "mixed_precision": "with the value bf16, fp32, fp16 or fp64",
    "torch_dtype": "with the value bf16, fp32, fp16 or fp64",
    "dtype": "with the value bf16, fp32, fp16 or fp64",
    "rank_microbatch_size": "in samples instead of tokens",
}
# What has no key here, and why none is needed or what to set instead.
_WITHOUT_KEY: Mapping[str, str] = {
    "gradient_accumulation_steps": (
        "leave it out: a step has as many micro-batches as train.global_batch_size and train.micro_batch_size need"
    ),
    "pipeline_model_parallel_size": "leave it out: lmscale has no pipeline parallelism; use parallel.tp or dp_shard",
    "pipeline_parallel_degree": "leave it out: lmscale has no pipeline parallelism; use parallel.tp or dp_shard",
    "context_parallel_size": "leave it out: lmscale has no context parallelism",
    "context_parallel_degree": "leave it out: lmscale has no context parallelism",
    "expert_model_parallel_size": "leave it out: lmscale has no expert parallelism",
    "bf16": "set engine.precision to bf16",
    "fp16": "set engine.precision to fp16",
    "untie_embeddings_and_output_weights": "set model.tie_embeddings to true or false",
    "zero_optimization": "set engine.kind to deepspeed, and engine.zero_stage",
    "architectures": "leave it out: model.norm, positions and activation describe the model",
    "model_type": "leave it out: model.norm, positions and activation describe the model",
}
_SECTIONS: Mapping[str, str] = {
    "training": "train",
    "trainer": "train",
    "optimizer": "optim",
    "lr_scheduler": "optim",
    "parallelism": "parallel",
    "model_args": "model",
    "network": "model",
    "dataset": "data",
    "evaluation": "eval",
    "validation": "eval",
    "checkpointing": "checkpoint",
    "logging": "log",
    "metrics": "log",
    "launcher": "cluster",
}


def key_for(path: Sequence[str | int]) -> str | None:
    """Our dotted key for an unknown key of a run file, in whatever section it is; None where no name is known."""
    if not path or len(path) > 2:
        return None
    earlier = EARLIER_KEYS.get(".".join(str(part) for part in path))
    return earlier or _KEYS.get(normal(path[-1]))


def advice_for(path: Sequence[str | int]) -> str | None:
    """The next action for an unknown key that has another name here, or that needs no key."""
    name = normal(path[-1]) if path else ""
    key = key_for(path)
    if key is not None:
        note = _NOTES.get(name)
        return f"rename it to {key}" + (f", {note}" if note else "")
    return _WITHOUT_KEY.get(name) if len(path) <= 2 else None


def section_for(name: str) -> str | None:
    """Our section for a section's name elsewhere."""
    return _SECTIONS.get(normal(name))


def normal(name: str | int) -> str:
    """The name in small letters with underscores."""
    return str(name).lower().replace("-", "_")
