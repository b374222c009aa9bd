"""The sections of a run file that say what is read: data and eval."""

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
        "virtual streams of the order; null: the first train.global_batch", default=None, ge=1
    )
    shuffle_window: int = identity("chunks that are shuffled together", default=16, ge=1)
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
    prefetch: int = placement("optimizer steps read ahead", default=2, ge=0)
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
