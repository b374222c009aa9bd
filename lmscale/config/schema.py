"""The sections of a run file. A field's description says what it means and in which unit.

The sections of a run file that say what is read: data and eval.

A whole run as one frozen value.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lmscale.config.cluster_schema import ClusterConfig
from lmscale.config.engine_kinds import ENGINE_KINDS, EngineKind, EngineName
from lmscale.config.fields import (
    LIST_OR_TEXT,
    NUMBER_OR_TEXT,
    NUMBER_TEXT_OR_NULL,
    ActivationCheckpointing,
    Bytes,
    Count,
    FloatPair,
    Paths,
    Section,
    SizeOrAuto,
    StepRange,
    StepsOrShare,
    Texts,
    as_corpora,
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
    """The architecture, as if for one device."""

    num_layers: int = identity("number of blocks", example=12, ge=1)
    hidden_size: int = identity("model dimension", example=768, ge=1)
    num_heads: int = identity("query heads", example=12, ge=1)
    num_kv_heads: int = identity(
        "key and value heads; null: as many as heads", default=None, ge=1, schema=_WHOLE_OR_NULL
    )
    head_dim: int = identity(
        "dimension of a head; null: width / heads", default=None, ge=1, schema=_WHOLE_OR_NULL
    )
    ffn_hidden_size: int = identity(
        "hidden size; null: 4 width, or for swiglu 8/3 width up to a multiple of 64",
        default=None,
        ge=1,
        schema=_WHOLE_OR_NULL,
    )
    vocab_size: int | None = identity("null: the tokenizer's", default=None, ge=1)
    max_positions: int | None = identity(
        "longest sequence the model has positions for; null: train.seq_len", default=None, ge=1
    )
    norm: Literal["rms", "layer"] = identity("kind of normalisation", default="rms")
    norm_order: Literal["pre", "post"] = identity("before or after each branch", default="pre")
    norm_eps: float = identity("added to the variance", default=1e-5, gt=0)
    positions: Literal["rotary", "learned", "none"] = identity("how they enter", default="rotary")
    rope_theta: float = identity("base of the rotary angles", default=10_000.0, gt=0)
    activation: Activation = identity("non-linearity", default="swiglu")
    bias: bool = identity("bias in every linear and layer norm", default=False)
    tie_embeddings: bool = identity("the head is the embedding, transposed", default=False)
    dropout: float = identity("probability, in every residual branch", default=0.0, ge=0, lt=1)
    init_std: float = identity("standard deviation of the initial weights", default=0.02, gt=0)
    trainable: Texts = identity("name patterns of the parameters that learn", default=("*",))

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        derived = ("num_kv_heads", "head_dim", "ffn_hidden_size")
        return {k: v for k, v in values.items() if k not in derived or v is not None}

    @model_validator(mode="after")
    def _derive(self) -> Self:
        """Sizes that follow from others, so that nobody downstream meets a None."""
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
    """What is predicted."""

    kind: Literal["causal"] = identity("causal: the next token", default="causal")


class ParallelConfig(Section):
    """Sizes of the mesh axes, outermost first: replicate, shard, tp."""

    dp_replicate: int = placement(
        "full copies of the sharded model: above 1, fsdp shards within groups of `shard` ranks and "
        "averages gradients over the groups (HSDP)",
        default=1,
        ge=1,
    )
    dp_shard: SizeOrAuto = placement(
        "ranks that share one copy (fsdp); auto: the ranks left over", default="auto"
    )
    tp: int = placement(
        "tensor parallel ranks; keep them inside one node. Divides the model's heads, kv_heads and "
        "feed_forward",
        default=1,
        ge=1,
    )
    sequence_parallel: bool = placement(
        "between the layers, where norms and dropout are, each tp rank has some of the tokens instead "
        "of all: less memory, the same traffic",
        default=False,
    )


class EngineConfig(Section):
    """Who computes one optimizer step, and in which precision."""

    kind: EngineName = placement("the engine", default="fsdp")
    zero_stage: Literal[0, 1, 2, 3] = placement(
        "what deepspeed splits over the ranks. 0: nothing; 1: optimizer states; 2: gradients too; "
        "3: weights too",
        default=2,
    )
    offload: Literal["none", "optimizer", "all", "nvme"] = placement(
        "what moves from the accelerator to the host. optimizer: its states and its update "
        "(deepspeed, zero_stage 1 to 3); all: weights and gradients too (fsdp, and zero_stage 3)",
        default="none",
    )
    precision: Literal["bf16", "fp32", "fp16", "fp64"] = placement(
        "of forward and backward; masters and moments stay fp32 or higher. fp16 (deepspeed) has a "
        "dynamic loss scale",
        default="bf16",
    )
    activation_checkpointing: ActivationCheckpointing = placement(
        "what of a forward is computed again in the backward. none; full: all but each block's input; "
        "every:N: that in every N-th block; selective: all but the results of matrix products and "
        "attention; budget:FRACTION: as much as leaves that part of the memory",
        default="none",
    )
    compile: bool = placement("torch.compile of each block", default=False)
    reshard_after_forward: bool = placement(
        "free gathered weights between forward and backward (fsdp)", default=True
    )

    @property
    def traits(self) -> EngineKind:
        """The engine's row in the table of engines."""
        return ENGINE_KINDS[self.kind]


class OptimConfig(Section):
    """The optimizer and its learning rate over time."""

    kind: Literal["adamw"] = identity("the optimizer", default="adamw")
    lr: float = identity("peak learning rate", example=3e-4, gt=0)
    betas: FloatPair = identity("decay of the first and second moment", default=(0.9, 0.95))
    eps: float = identity("added to the root of the second moment", default=1e-8, gt=0)
    weight_decay: float = identity("decoupled, per unit of learning rate", default=0.1, ge=0)
    max_grad_norm: float | None = identity(
        "largest global gradient norm; null: none", default=1.0, gt=0
    )
    schedule: Literal["cosine", "wsd", "constant"] = identity(
        "after the warm-up; wsd: constant, then linear decay", default="cosine"
    )
    warmup_steps: StepsOrShare = identity('linear warm-up: steps, or a share like "5%"', default=0)
    decay_steps: StepsOrShare = identity(
        "linear, at the end of wsd: as warmup_steps", default="20%"
    )
    final_lr_frac: float = identity("last learning rate as a share of lr", default=0.1, ge=0, le=1)
    max_nonfinite_steps: int = identity(
        "non-finite steps in a row that are skipped before the run ends (86); fp16 needs 20 or more, to "
        "find its loss scale",
        default=0,
        ge=0,
    )


class TrainConfig(Section):
    """How long, with which batches, from where and to where."""

    seq_len: int = identity("tokens a sample is trained on", example=1024, ge=1)
    global_batch_size: int = identity("samples of one optimizer step, all ranks", example=256, ge=1)
    micro_batch_size: int = placement("most samples of one forward on one rank", default=8, ge=1)
    steps: Count | None = identity(
        "optimizer steps of the whole run", default=None, ge=1, schema=NUMBER_TEXT_OR_NULL
    )
    tokens: Count | None = identity(
        'tokens of the whole run, e.g. "20B"', default=None, ge=1, schema=NUMBER_TEXT_OR_NULL
    )
    epochs: float | None = identity("passes over the corpora", default=None, gt=0)
    stop_at: Count | None = placement(
        "step at which this start saves and ends, while the schedule still aims at steps",
        default=None,
        ge=1,
        schema=NUMBER_TEXT_OR_NULL,
    )
    seed: int = identity("of weights, order and dropout", default=0, ge=0, lt=2**63)
    deterministic: bool = placement("bitwise the same result on the same ranks", default=False)
    run_dir: str = placement(
        "the run folder; null: runs/<name of the run file>",
        default=None,
        min_length=1,
        schema={"type": ["string", "null"]},
    )
    resume: str = placement(
        "auto: go on from the run folder's newest checkpoint; never; or a checkpoint's path",
        default="auto",
        min_length=1,
    )
    init_from: str | None = identity(
        "checkpoint whose weights a new run starts from", default=None, min_length=1
    )
    allow_change: Texts = placement("identity keys that a resume may change", default=())
    replica_check_every_steps: int | None = placement(
        "steps between comparisons of the ranks that should hold the same weights, bit for bit; one that "
        "differs ends the run; null: never",
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
    """When the state is saved, and how much of it is kept."""

    every_steps: int | None = placement("null: not by steps", default=1000, ge=1)
    every_minutes: float | None = placement("null: not by time", default=None, gt=0)
    keep: int = placement("newest checkpoints kept", default=3, ge=1)
    asynchronous: bool = placement("write while training goes on", default=False, alias="async")


class ProfileConfig(Section):
    """A trace of the profiler."""

    steps: StepRange = placement("first and last step, both included", example="10:12")


class LogConfig(Section):
    """What is shown and recorded beside metrics.jsonl, which has every step."""

    trackers: Texts = placement("where metrics go as well", default=("tensorboard",))
    every_steps: int = placement(
        "steps between progress lines in a log; on a terminal one line is drawn anew",
        default=10,
        ge=1,
    )
    profile: ProfileConfig | None = placement("profile some steps; null: none", default=None)
    layer_stats: bool = placement("record the gradient norm of each layer", default=False)


class CorpusConfig(Section):
    """One corpus and its share of the samples."""

    path: str = identity("folder made by lmscale prepare", example="data/smoke", min_length=1)
    weight: int = identity("share of the samples, relative to the other weights", default=1, ge=0)


class DataConfig(Section):
    """What is read, and in which order."""

    corpora: Annotated[tuple[CorpusConfig, ...], as_corpora] = identity(
        "training corpora; of a prepared collection its train part",
        example=["data/smoke"],
        schema=LIST_OR_TEXT | {"minItems": 1},
    )
    tokenizer: str | None = identity("file; null: the corpus' own", default=None, min_length=1)
    documents: Literal["separate", "joined"] = identity(
        "separate: no attention, position or target crosses a document's border",
        default="separate",
    )
    streams: int | None = identity(
        "virtual streams of the order; null: the first train.global_batch_size", default=None, ge=1
    )
    shuffle_window_chunks: int = identity("chunks that are shuffled together", default=16, ge=1)
    mix_block: int = identity("draws in which the corpora's weights hold", default=256, ge=1)
    window_memory: Bytes = placement(
        "most memory of a rank for shuffle windows, in bytes",
        default=1 << 30,
        ge=0,
        schema=NUMBER_OR_TEXT,
    )
    on_damage: Literal["fail", "mask"] = placement("what a damaged chunk does", default="fail")
    max_damage_rate: float = placement(
        "share of masked samples that ends the run", default=0.001, ge=0, le=1
    )
    cache_dir: str | None = placement(
        "folder on the node's own disk, filled before the first step with the chunks that the node "
        "reads next; null: none",
        default=None,
        min_length=1,
    )
    cache_bytes: Bytes | None = placement(
        "most bytes in cache_dir; null: what its disk has, less 5 % or 10 GiB",
        default=None,
        schema=NUMBER_TEXT_OR_NULL,
    )
    prefetch_steps: int = placement("optimizer steps read ahead", default=2, ge=0)
    trace: bool = placement("write every sample that was trained on to trace/", default=False)


class EvalConfig(Section):
    """Held-out corpora, read in order and once."""

    corpora: Paths = placement(
        "held-out corpora; of a prepared collection its heldout part",
        default=(),
        schema=LIST_OR_TEXT,
    )
    every_steps: int | None = placement("null: at the end only", default=1000, ge=1)
    max_samples: int | None = placement("of each corpus; null: all", default=None, ge=1)


class RunConfig(Section):
    """Everything a run is. Made by lmscale.config.run_file.load, which also checks and resolves it."""

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
