"""The sections `data` and `eval` of a run file: what is read, and in which order."""

from typing import Annotated, Literal

from lmscale.config.fields import (
    LIST_OR_TEXT,
    NUMBER_OR_TEXT,
    NUMBER_TEXT_OR_NULL,
    Bytes,
    Paths,
    Section,
    as_corpora,
    identity,
    placement,
)


class CorpusConfig(Section):
    """One training corpus and its share of the samples."""

    path: str = identity(
        "Path of a folder made by lmscale prepare.", example="data/smoke", min_length=1
    )
    weight: int = identity(
        "Share of the samples, relative to the weights of the other corpora.", default=1, ge=0
    )


class DataConfig(Section):
    """Training corpora, and the order in which their samples are read."""

    corpora: Annotated[tuple[CorpusConfig, ...], as_corpora] = identity(
        "Training corpora, so far exactly one; of a prepared collection its train part is read.",
        example=["data/smoke"],
        schema=LIST_OR_TEXT | {"minItems": 1},
    )
    tokenizer: str | None = identity(
        "Path of the tokenizer file. null means the tokenizer of the corpus.",
        example="data/smoke/train/tokenizer.json",
        default=None,
        min_length=1,
    )
    documents: Literal["separate", "joined"] = identity(
        "How documents share a sample. separate: no attention, position or target crosses the "
        "border of a document; joined: they form one text.",
        default="separate",
    )
    streams: int | None = identity(
        "Number of virtual streams of the sample order. null means the first "
        "train.global_batch_size.",
        example=256,
        default=None,
        ge=1,
    )
    shuffle_window_chunks: int = identity(
        "Number of chunks that are shuffled together.", default=16, ge=1
    )
    mix_block: int = identity(
        "Number of draws in which the weights of the corpora are exact.", default=256, ge=1
    )
    window_memory: Bytes = placement(
        "Largest memory per rank for shuffle windows, in bytes.",
        example="2 GiB",
        default=1 << 30,
        ge=0,
        schema=NUMBER_OR_TEXT,
    )
    on_damage: Literal["fail", "mask"] = placement(
        "What happens at a damaged chunk: fail ends the run; mask (not supported yet) leaves its samples out of the"
        " loss.",
        default="fail",
    )
    max_damage_rate: float = placement(
        "Fraction of masked samples at which the run ends. Not supported yet.",
        default=0.001,
        ge=0,
        le=1,
    )
    cache_dir: str | None = placement(
        "Folder on the disk of each node that is filled, before the first step, with the chunks"
        " that the node reads next. null means no cache.",
        example="/scratch/lmscale",
        default=None,
        min_length=1,
    )
    cache_bytes: Bytes | None = placement(
        "Largest size of cache_dir, in bytes. null means the free space of its disk less 5 % or"
        " 10 GiB.",
        example="500 GiB",
        default=None,
        schema=NUMBER_TEXT_OR_NULL,
    )
    prefetch_steps: int = placement(
        "Number of optimizer steps whose samples are read ahead.", default=2, ge=0
    )
    trace: bool = placement(
        "Whether every sample that was trained on is recorded in trace/.", default=False
    )


class EvalConfig(Section):
    """Evaluation on held-out corpora, which are read once and in order."""

    corpora: Paths = placement(
        "Held-out corpora; of a prepared collection its heldout part is read.",
        example=["data/smoke"],
        default=(),
        schema=LIST_OR_TEXT,
    )
    every_steps: int | None = placement(
        "Number of optimizer steps between evaluations. null means only at the end.",
        default=1000,
        ge=1,
    )
    max_samples: int | None = placement(
        "Largest number of samples per corpus. null means all.", example=1024, default=None, ge=1
    )
