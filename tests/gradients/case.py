"""The cases of the gradient matrix: words, what they mean as a run, and the rows that every case trains on.

A case is one value of each factor: those of a run and those that a restart may change (lmscale/config/proven.py), and
`clip`. Its name is its words, so a case can be typed: `fsdp tp2 sequence full fp64 separate llama accumulated largest`.

Shapes: B rows, L tokens a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lmscale.base.batch import Batch, Stream
from lmscale.config.data_schema import DataConfig
from lmscale.config.proven import clash
from lmscale.config.schema import (
    EngineConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from lmscale.model.build import build_model
from lmscale.model.transformer import LanguageModel

# 40 rows deal out evenly over 1, 2, 4 and 8 ranks, and each share makes three micro-batches of which the last is short.
ROWS, LENGTH, STEPS = 40, 16, 3
FILLERS = 3  # with unequal targets the step's last rows are fillers: the last rank has micro-batches without a target
WORLDS = (1, 2, 4, 8)
LR = 1e-2
# Adam divides by a root: where a gradient vanishes, a smaller eps would turn rounding into full-size steps.
EPS = 1e-4

_WIDE = {"hidden_size": 64, "num_heads": 8, "num_layers": 2, "init_std": 0.1}
_STYLES: Mapping[str, dict[str, Any]] = {
    "llama": {**_WIDE, "num_kv_heads": 4, "ffn_hidden_size": 48},
    "gpt2": {
        **_WIDE,
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
        "ffn_hidden_size": 96,
    },
    # What neither has: norms after the branches, heads wider than width / heads, an untied head behind biases.
    "mixed": {
        **_WIDE,
        "hidden_size": 48,
        "head_dim": 8,
        "num_kv_heads": 4,
        "norm_order": "post",
        "rope_theta": 10.0,  # over 16 tokens the usual angles hardly turn, and a key's bias would have no gradient
        "activation": "gelu",
        "bias": True,
        "ffn_hidden_size": 88,
    },
}
# Of 256 stored rows: with tp 4 the last rank has some padding, or (mixed) nothing else.
_VOCAB = {"llama": 250, "gpt2": 250, "mixed": 190}
# Words of a case's name that are not the factor's value. "": the usual, which goes without saying.
_WORDS: Mapping[tuple[str, str], str] = {
    ("sequence_parallel", "off"): "",
    ("sequence_parallel", "on"): "sequence",
    ("recompute", "none"): "",
    ("offload", "none"): "",
    ("offload", "optimizer"): "offload-optimizer",
    ("offload", "all"): "offload-all",
    ("compile", "off"): "",
    ("compile", "on"): "compiled",
    ("reshard", "on"): "",
    ("reshard", "off"): "gathered",
    ("dropout", "off"): "",
    ("dropout", "on"): "dropout",
    ("accumulation", "1"): "",
    ("accumulation", "3"): "accumulated",
    ("targets", "equal"): "",
    ("clip", "off"): "",
    ("clip", "on"): "clipped",
}
VALUES: Mapping[str, tuple[str, ...]] = {
    "engine": ("ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3"),
    "tp": ("1", "2", "4", "8"),
    "sequence_parallel": ("off", "on"),
    "recompute": ("none", "full", "selective", "every", "budget"),
    "precision": ("fp32", "bf16", "fp64", "fp16"),
    "offload": ("none", "optimizer", "all"),
    "compile": ("off", "on"),
    "reshard": ("on", "off"),
    "documents": ("separate", "joined"),
    "style": ("llama", "gpt2", "mixed"),
    # drawn: by torch's generator, whose masks are one process's only where one rank sees the whole batch
    "dropout": ("off", "on", "drawn"),
    "accumulation": ("1", "3"),
    "targets": ("equal", "unequal"),
    "world": ("smallest", "largest"),
    "clip": ("off", "on"),
}


@dataclass(frozen=True, kw_only=True)
class GradientCase:
    """One cell of the matrix: a value of each factor."""

    engine: str
    tp: str = "1"
    sequence_parallel: str = "off"
    recompute: str = "none"
    precision: str = "fp32"
    offload: str = "none"
    compile: str = "off"
    reshard: str = "on"
    documents: str = "separate"
    style: str = "llama"
    dropout: str = "off"
    accumulation: str = "1"
    targets: str = "equal"
    world: str = "smallest"
    clip: str = "off"

    @classmethod
    def named(cls, name: str) -> "GradientCase":
        """The case of this name."""
        found = {}
        for word in name.split():
            points = [
                (f, v) for f, values in VALUES.items() for v in values if word_of(f, v) == word
            ]
            assert len(points) == 1, f"{word!r} of {name!r} means {points}"
            found.update(points)
        return cls(**found)

    @property
    def words(self) -> dict[str, str]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def name(self) -> str:
        return " ".join(filter(None, (word_of(*point) for point in self.words.items())))

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        worlds = self._worlds()
        return worlds[0] if self.world == "smallest" else worlds[-1]

    @property
    def dp(self) -> int:
        return self.ranks // int(self.tp)

    def problem(self) -> str | None:
        """Why there is no such case; None where there is one."""
        return problem(self.words)

    def _worlds(self) -> list[int]:
        least = int(self.tp) * (2 if self.engine == "hsdp" else 1)
        return [size for size in WORLDS if size >= least]

    def config(self) -> RunConfig:
        """What a run file would say."""
        zero = self.engine.startswith("zero")
        recompute = {"every": "every:2", "budget": "budget:0.5"}.get(self.recompute, self.recompute)
        engine = EngineConfig(
            kind="deepspeed" if zero else self.engine.replace("hsdp", "fsdp"),
            zero_stage=int(self.engine[-1]) if zero else 2,
            precision=self.precision,
            offload=self.offload,
            activation_checkpointing=recompute,
            compile=self.compile == "on",
            reshard_after_forward=self.reshard == "on",
        )
        parallel = ParallelConfig(
            dp_replicate=2 if self.engine == "hsdp" else 1,
            tp=int(self.tp),
            sequence_parallel=self.sequence_parallel == "on",
        )
        return RunConfig.model_construct(
            model=self.model(),
            data=DataConfig(corpora=("none",), documents=self.documents),
            parallel=parallel,
            engine=engine,
            optim=OptimConfig(lr=LR, eps=EPS, weight_decay=0.1, max_grad_norm=self.largest_norm),
            train=TrainConfig(
                seq_len=LENGTH,
                global_batch_size=ROWS,
                steps=STEPS,
                deterministic=self.dropout == "on",
            ),
            log=LogConfig(),
        )

    @property
    def largest_norm(self) -> float | None:
        """Far below this model's norms, so that clipping is always at work; or none, so that AdamW sees the scale."""
        return 0.3 if self.clip == "on" else None

    def model(self) -> ModelConfig:
        sizes = dict(_STYLES[self.style])
        if self.tp == "8":
            sizes["num_kv_heads"] = 8
        return ModelConfig(**sizes, dropout=0.0 if self.dropout == "off" else 0.2)


def problem(words: Mapping[str, str]) -> str | None:
    """Why these values exclude each other; None if they do not. Values that are missing are not looked at."""
    drawn = words.get("dropout") == "drawn"
    if found := clash({**words, "dropout": "on"} if drawn else words):
        return found
    if words.get("engine") == "hsdp" and words.get("tp") == "8":
        return f"hsdp with tp 8 needs more than {WORLDS[-1]} ranks"
    others = (
        *(("engine", "hsdp"), ("sequence_parallel", "on"), ("accumulation", "3")),
        *(("compile", "on"), ("world", "largest")),
    )
    if drawn and any(words.get(factor) == value for factor, value in others):
        return "one process draws other masks"
    return None


def word_of(factor: str, value: str) -> str:
    """How a value is called in a case's name."""
    spoken = {"tp": f"tp{value}"}.get(factor, value)
    return _WORDS.get((factor, value), spoken)


def model_of(case: GradientCase) -> LanguageModel:
    """In fp32, with biases and norms that are not the neutral ones they start as, where some mistakes would hide."""
    model = build_model(case.model(), vocab_size=_VOCAB[case.style], max_positions=LENGTH)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or ".norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    return model


def rows_of(case: GradientCase, step: int) -> Batch[Tensor]:
    """The rows of a step, whoever trains on them."""
    draw = torch.Generator().manual_seed(1000 + step)
    tokens_BL1 = torch.randint(0, _VOCAB[case.style], (ROWS, LENGTH + 1), generator=draw)
    place_BL = torch.arange(LENGTH).expand(ROWS, LENGTH)
    border_B1 = torch.randint(1, LENGTH, (ROWS, 1), generator=draw)
    documents_BL = (place_BL >= border_B1).long() if case.documents == "separate" else None
    positions_BL = place_BL if documents_BL is None else place_BL - border_B1 * documents_BL
    weights_BL, rows_B = torch.ones(ROWS, LENGTH), torch.arange(ROWS) + ROWS * step
    if case.targets == "unequal":
        share_B1 = torch.linspace(1, 0.2, ROWS)[:, None]  # fewer and fewer from rank to rank
        weights_BL = (torch.rand(ROWS, LENGTH, generator=draw) < share_B1).float()
        weights_BL[-FILLERS:], rows_B[-FILLERS:] = 0, -1
        if documents_BL is not None:
            documents_BL[-FILLERS:] = -1
    stream = Stream(tokens_BL1[:, :-1].contiguous(), positions_BL.contiguous(), documents_BL)
    return Batch(stream, None, tokens_BL1[:, 1:].contiguous(), weights_BL, rows_B)


def micro_batches(case: GradientCase, step: int, dp_rank: int) -> list[Batch[Tensor]]:
    """A data-parallel rank's part of the step."""
    rows, share = rows_of(case, step), ROWS // case.dp
    size = -(-share // int(case.accumulation))
    first, last = dp_rank * share, (dp_rank + 1) * share
    return [
        rows.map(lambda array, s=start: array[s : min(s + size, last)].contiguous())
        for start in range(first, last, size)
    ]


def by_world(cases: Sequence[GradientCase]) -> list[GradientCase]:
    """Ordered so that one pool of ranks after another is at work."""
    return sorted(cases, key=lambda case: case.ranks)


def unreachable(name: str, style: GradientCase) -> bool:
    """Whether this parameter's gradient is zero in theory: a key's bias moves all scores of a query alike."""
    return name.endswith("attention.k.bias") and style.model().positions != "rotary"


def padding_rows(name: str, case: GradientCase) -> slice | None:
    """The rows of a parameter that are the vocabulary's padding."""
    if name not in ("decoder.embedding.weight", "heads.lm.weight"):
        return None
    return slice(_VOCAB[case.style], None)
