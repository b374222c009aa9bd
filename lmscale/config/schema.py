"""The sections of a run file and the whole run as one frozen value.

The description of a field is the documentation of its key: a full sentence with the unit and the meaning of null. Error
messages, configs/schema.json and docs/configuration.md show it.
"""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from lmscale.config.cluster_schema import ClusterConfig
from lmscale.config.data_schema import DataConfig, EvalConfig
from lmscale.config.engine_kinds import ENGINE_KINDS, EngineKind, EngineName
from lmscale.config.fields import (
    NUMBER_TEXT_OR_NULL,
    ActivationCheckpointing,
    Count,
    FloatPair,
    Section,
    SizeOrAuto,
    StepRange,
    StepsOrShare,
    Texts,
    identity,
    placement,
)
from lmscale.modelspec.feed_forward import FEED_FORWARDS

if TYPE_CHECKING:
    Activation = str
else:  # the names of the table, so that a new kind needs no edit here
    Activation = Literal[tuple(FEED_FORWARDS)]

_WHOLE_OR_NULL: dict[str, Any] = {"type": ["integer", "null"]}


class ModelConfig(Section):
    """Architecture of the model, independent of how it is split over devices."""

    num_layers: int = identity("Number of decoder blocks.", example=12, ge=1)
    hidden_size: int = identity(
        "Size of the hidden state, in elements per token.", example=768, ge=1
    )
    num_heads: int = identity("Number of query heads per block.", example=12, ge=1)
    num_kv_heads: int = identity(
        "Number of key and value heads per block; a divisor of num_heads (grouped-query "
        "attention). null means num_heads.",
        example=4,
        default=None,
        ge=1,
        schema=_WHOLE_OR_NULL,
    )
    head_dim: int = identity(
        "Size of one attention head, in elements. null means hidden_size / num_heads.",
        example=64,
        default=None,
        ge=1,
        schema=_WHOLE_OR_NULL,
    )
    ffn_hidden_size: int = identity(
        "Size of the hidden layer of the feed-forward network, in elements. null means 4 "
        "hidden_size, or for swiglu 8/3 hidden_size rounded up to a multiple of 64.",
        example=2048,
        default=None,
        ge=1,
        schema=_WHOLE_OR_NULL,
    )
    vocab_size: int | None = identity(
        "Number of token ids that the model has embeddings for. null means the vocabulary of "
        "the tokenizer.",
        example=32000,
        default=None,
        ge=1,
    )
    max_positions: int | None = identity(
        "Length of the longest sequence that the model has positions for, in tokens. null means"
        " train.seq_len.",
        example=4096,
        default=None,
        ge=1,
    )
    norm: Literal["rms", "layer"] = identity(
        "Kind of normalisation: rms is RMSNorm, layer is LayerNorm.", default="rms"
    )
    norm_order: Literal["pre", "post"] = identity(
        "Place of the normalisation: pre is before each branch of a block, post is after it.",
        default="pre",
    )
    norm_eps: float = identity(
        "Number that is added to the variance in each normalisation.", default=1e-5, gt=0
    )
    positions: Literal["rotary", "learned", "none"] = identity(
        "How positions enter the model: rotary turns queries and keys, learned adds an "
        "embedding per position, none leaves them out.",
        default="rotary",
    )
    rope_theta: float = identity(
        "Base of the rotary angles; it is read where positions is rotary.",
        example=500000.0,
        default=10_000.0,
        gt=0,
    )
    activation: Activation = identity(
        "Non-linearity of the feed-forward network; swiglu has a gate and therefore three "
        "matrices.",
        default="swiglu",
    )
    bias: bool = identity("Whether every linear layer and layer norm has a bias.", default=False)
    tie_embeddings: bool = identity(
        "Whether the output layer uses the matrix of the input embedding.", default=False
    )
    dropout: float = identity(
        "Probability with which an element of a residual branch becomes zero in training.",
        example=0.1,
        default=0.0,
        ge=0,
        lt=1,
    )
    init_std: float = identity("Standard deviation of the initial weights.", default=0.02, gt=0)
    trainable: Texts = identity(
        "Name patterns of the parameters that are trained; all others stay frozen.",
        example=["*norm*"],
        default=("*",),
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        derived = ("num_kv_heads", "head_dim", "ffn_hidden_size")
        return {k: v for k, v in values.items() if k not in derived or v is not None}

    @model_validator(mode="after")
    def _derive(self) -> Self:
        """Fill in the sizes that follow from others, so that no reader of the value needs to handle None."""
        derived = {
            "num_kv_heads": self.num_heads,
            "head_dim": max(1, self.hidden_size // self.num_heads),
            "ffn_hidden_size": FEED_FORWARDS[self.activation].default_hidden_size(self.hidden_size),
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        return self


class ObjectiveConfig(Section):
    """What the model learns to predict."""

    kind: Literal["causal"] = identity(
        "Training objective: causal predicts the next token.", default="causal"
    )


class ParallelConfig(Section):
    """Sizes of the mesh axes, outermost first: dp_replicate, dp_shard, tp."""

    dp_replicate: int = placement(
        "Number of full copies of the sharded model. Above 1, fsdp shards within groups of "
        "dp_shard ranks and averages gradients over the groups (HSDP).",
        example=2,
        default=1,
        ge=1,
    )
    dp_shard: SizeOrAuto = placement(
        "Number of ranks that share one copy of the model (fsdp). auto means all ranks that the"
        " other axes leave.",
        example=8,
        default="auto",
    )
    tp: int = placement(
        "Number of tensor parallel ranks; they should be in one node. It must divide "
        "model.num_heads, num_kv_heads and ffn_hidden_size.",
        example=2,
        default=1,
        ge=1,
    )
    sequence_parallel: bool = placement(
        "Whether each tensor parallel rank keeps only a part of the tokens between the layers, "
        "where norms and dropout are: less memory for the same traffic.",
        default=False,
    )


class EngineConfig(Section):
    """Engine that computes one optimizer step, its precision and its memory."""

    kind: EngineName = placement("Engine that computes one optimizer step.", default="fsdp")
    zero_stage: Literal[0, 1, 2, 3] = placement(
        "What deepspeed splits over the ranks: 0 nothing, 1 the optimizer states, 2 the "
        "gradients as well, 3 the weights as well.",
        default=2,
    )
    offload: Literal["none", "optimizer", "all", "nvme"] = placement(
        "What is kept in host memory instead of the accelerator. optimizer: the optimizer "
        "states and the update (deepspeed with zero_stage 1 to 3); all: weights and gradients "
        "as well (fsdp, and zero_stage 3); nvme is not supported.",
        default="none",
    )
    precision: Literal["bf16", "fp32", "fp16", "fp64"] = placement(
        "Precision of forward and backward; master weights and optimizer moments stay fp32 or "
        "higher. fp16 (deepspeed) has a dynamic loss scale.",
        default="bf16",
    )
    activation_checkpointing: ActivationCheckpointing = placement(
        "Activations that are computed again in the backward pass. none; full: all but the "
        "input of each block; every:N: full in every N-th block; selective: all but the results"
        " of matrix products and attention; budget:FRACTION: as many as reduce the memory to "
        "that fraction.",
        example="full",
        default="none",
    )
    compile: bool = placement("Whether each block is compiled with torch.compile.", default=False)
    reshard_after_forward: bool = placement(
        "Whether gathered weights are freed between forward and backward (fsdp).", default=True
    )

    @property
    def traits(self) -> EngineKind:
        """The engine's row in the table of engines."""
        return ENGINE_KINDS[self.kind]


class OptimConfig(Section):
    """Optimizer and learning rate schedule."""

    kind: Literal["adamw"] = identity(
        "Optimizer: adamw is Adam with decoupled weight decay.", default="adamw"
    )
    lr: float = identity("Peak learning rate.", example=3e-4, gt=0)
    betas: FloatPair = identity(
        "Decay of the first and second moment per step.", default=(0.9, 0.95)
    )
    eps: float = identity(
        "Number that is added to the root of the second moment.", default=1e-8, gt=0
    )
    weight_decay: float = identity(
        "Decoupled weight decay per unit of learning rate.", default=0.1, ge=0
    )
    max_grad_norm: float | None = identity(
        "Largest global gradient norm; larger gradients are scaled down to it. null means no "
        "limit.",
        default=1.0,
        gt=0,
    )
    schedule: Literal["cosine", "wsd", "constant"] = identity(
        "Learning rate after the warm-up: cosine and wsd decay to final_lr_frac, wsd only at "
        "the end of the run; constant does not decay.",
        default="cosine",
    )
    warmup_steps: StepsOrShare = identity(
        'Length of the linear warm-up, in optimizer steps or as a share of all steps such as "5%".',
        example="5%",
        default=0,
    )
    decay_steps: StepsOrShare = identity(
        "Length of the linear decay at the end of a wsd schedule, in optimizer steps or as a "
        "share of all steps.",
        default="20%",
    )
    final_lr_frac: float = identity(
        "Last learning rate as a fraction of lr.", default=0.1, ge=0, le=1
    )
    max_nonfinite_steps: int = identity(
        "Number of consecutive steps with a non-finite gradient norm that are skipped before "
        "the run ends with exit code 86. fp16 needs 20 or more to find its loss scale.",
        example=20,
        default=0,
        ge=0,
    )


class TrainConfig(Section):
    """Length, batches, seed and run folder of a run."""

    seq_len: int = identity("Length of a sample, in tokens.", example=1024, ge=1)
    global_batch_size: int = identity(
        "Number of samples per optimizer step, over all ranks.", example=256, ge=1
    )
    micro_batch_size: int = placement(
        "Largest number of samples of one forward pass on one rank.", default=8, ge=1
    )
    steps: Count | None = identity(
        "Length of the whole run, in optimizer steps; give one of steps, tokens and epochs.",
        example=100000,
        default=None,
        ge=1,
        schema=NUMBER_TEXT_OR_NULL,
    )
    tokens: Count | None = identity(
        "Length of the whole run, in tokens; give one of steps, tokens and epochs.",
        example="20B",
        default=None,
        ge=1,
        schema=NUMBER_TEXT_OR_NULL,
    )
    epochs: float | None = identity(
        "Length of the whole run, in passes over the training corpora; give one of steps, "
        "tokens and epochs.",
        example=1.5,
        default=None,
        gt=0,
    )
    stop_at: Count | None = placement(
        "Step at which this start saves a checkpoint and ends, while the learning rate still "
        "follows the whole run. null means the last step.",
        example=500,
        default=None,
        ge=1,
        schema=NUMBER_TEXT_OR_NULL,
    )
    seed: int = identity(
        "Seed of initial weights, sample order and dropout.", default=0, ge=0, lt=2**63
    )
    deterministic: bool = placement(
        "Whether the same ranks compute bitwise the same result in every run.", default=False
    )
    run_dir: str = placement(
        "Path of the run folder. null means runs/<name of the run file>.",
        example="runs/llama-1b",
        default=None,
        min_length=1,
        schema={"type": ["string", "null"]},
    )
    resume: str = placement(
        "Where a start continues: auto means from the newest checkpoint of the run folder, "
        "never refuses a run folder with checkpoints, a path names a checkpoint of another run.",
        default="auto",
        min_length=1,
    )
    init_from: str | None = identity(
        "Path of a checkpoint whose weights a new run starts from; not supported yet. null means random initial "
        "weights.",
        example="runs/base/checkpoints/step-00010000-a1",
        default=None,
        min_length=1,
    )
    allow_change: Texts = placement(
        "Identity keys that a resume may change.", example=["train.steps"], default=()
    )
    replica_check_every_steps: int | None = placement(
        "Number of steps between bitwise comparisons of the ranks that have the same weights; a"
        " difference ends the run. null means never.",
        example=1000,
        default=None,
        ge=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("run_dir", "") is None:
            return {key: value for key, value in values.items() if key != "run_dir"}
        return values


class CheckpointConfig(Section):
    """When checkpoints are saved, and how many are kept."""

    every_steps: int | None = placement(
        "Number of optimizer steps between checkpoints. null means not by steps.",
        default=1000,
        ge=1,
    )
    every_minutes: float | None = placement(
        "Time between checkpoints, in minutes. null means not by time.",
        example=30.0,
        default=None,
        gt=0,
    )
    keep: int = placement("Number of newest checkpoints that are kept.", default=3, ge=1)
    asynchronous: bool = placement(
        "Whether a checkpoint is written while training continues. Not supported yet.",
        default=False,
        alias="async",
    )


class ProfileConfig(Section):
    """Steps for which the profiler records a trace."""

    steps: StepRange = placement(
        "First and last step that are profiled, both included.", example="10:12"
    )


class LogConfig(Section):
    """What is shown and recorded besides metrics.jsonl, which has every step."""

    trackers: Texts = placement(
        "Where metrics are written besides metrics.jsonl.", default=("tensorboard",)
    )
    every_steps: int = placement(
        "Number of steps between progress lines in a log; on a terminal one line is drawn again.",
        default=10,
        ge=1,
    )
    profile: ProfileConfig | None = placement(
        "Steps whose profiler trace is recorded. null means none.",
        example={"steps": "10:12"},
        default=None,
    )
    layer_stats: bool = placement(
        "Whether the gradient norm of each layer is recorded.", default=False
    )


class RunConfig(Section):
    """A whole run. lmscale.config.run_file.load makes it, and checks and resolves it as well."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)


SECTIONS = tuple(RunConfig.model_fields)
