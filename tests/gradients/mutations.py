"""Bugs that are planted in the product's code, one at a time, and the case of the pairs that detects each.

The first fourteen occurred in other trainers; the others are from every layer. `tools/gradient_matrix.py --mutations`
finds the cases again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from lmscale.engine import base, ddp, fsdp, layout, torch_engine
from lmscale.engine.deepspeed import engine as deepspeed_engine
from lmscale.model import attention
from lmscale.parallel import (
    activation_checkpointing as recompute,
)
from lmscale.parallel import (
    collectives,
    shard,
    tensor,
)
from lmscale.parallel import (
    tensor as vocabulary,
)
from tests.gradients import plants
from tests.gradients.case import GradientCase, by_world
from tests.gradients.cover import pairs
from tests.gradients.errors import compared
from tests.gradients.plants import Plant, all_of, in_loss, replaced, replaced_method
from tests.gradients.run import NARROW, Outcome, on_ranks, one_process


@dataclass(frozen=True)
class Bug:
    """What is wrong, where it can show, and the case that catches it."""

    plant: Plant
    case: str = ""
    where: Mapping[str, str] = field(default_factory=dict)  # values, any of which a case must have

    def shows(self, case: GradientCase) -> bool:
        return all(case.words[factor] in values.split() for factor, values in self.where.items())


def planted(name: str, case: GradientCase) -> Outcome:
    """Runs on every rank: a case with a bug in the product."""
    with BUGS[name].plant():
        return on_ranks(case)


def caught(name: str, case: GradientCase, ranks: Any) -> list[str]:
    """What of the case is beyond its tolerance; empty: the bug is not detected. Exceptions are passed on."""
    answer, *_ = ranks(planted, name, case)
    _, beyond = compared(case, answer, one_process(case))
    return beyond


def caught_by(name: str, of_size: Callable[[int], Any]) -> tuple[str, list[str]]:
    """The first pair case that detects the bug, with few ranks and high precision first; ("", []) if none."""
    bug = BUGS[name]
    for case in by_world(sorted(pairs(), key=lambda case: case.precision in NARROW)):
        if bug.shows(case) and (problems := caught(name, case, of_size(case.ranks))):
            return case.name, problems
    return "", []


_TP, _SEQUENCE = {"tp": "2 4"}, {"sequence_parallel": "on"}
BUGS: Mapping[str, Bug] = {
    "an all-reduce is dropped": Bug(
        lambda: patch.object(collectives._Enter, "backward", lambda ctx, grad: (grad, None)),
        where={**_TP, "sequence_parallel": "off"},
        case="zero2 tp2 full fp32 separate gpt2 drawn unequal smallest clipped",
    ),
    "gradients are doubled per micro-batch": Bug(
        replaced_method(ddp.DdpEngine, "_micro_step", plants.doubled),
        where={"engine": "ddp", "accumulation": "3"},
        case="ddp tp2 full fp64 separate gpt2 accumulated largest clipped",
    ),
    "each rank divides by its own tokens": Bug(
        replaced(base, "count_targets", plants.per_rank_weight),
        where={"targets": "unequal", "world": "largest"},
        case="fsdp tp4 full fp64 offload-all gathered separate llama accumulated unequal largest",
    ),
    "the norm counts a replicated parameter twice": Bug(
        lambda: patch.object(layout.TpLayout, "tp_copies", lambda self, name: 1),
        where=_TP,
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "norms' gradients are not summed under sequence parallelism": Bug(
        lambda: patch.object(base, "sum_partial_gradients", lambda gradients, mesh: None),
        where=_SEQUENCE,
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "dropout differs over tp": Bug(
        lambda: patch.object(torch, "initial_seed", lambda: 77 + dist.get_rank()),
        where={**_TP, "dropout": "on"},
        case="zero1 tp2 sequence full bf16 offload-optimizer joined mixed dropout smallest",
    ),
    "the vocabulary's maximum is not reduced": Bug(
        replaced(vocabulary, "sum_ranks", plants.not_reduced),
        where=_TP,
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "the loss mask is off by one": Bug(
        in_loss(lambda h, w, targets, weights: (h, w, targets, weights.roll(1))),
        where={"targets": "unequal"},
        case="zero2 tp1 fp32 separate mixed unequal smallest",
    ),
    "the last micro-batch is dropped": Bug(
        replaced_method(base.Engine, "step", plants.without_last),
        where={"accumulation": "3"},
        case="fsdp tp1 bf16 gathered separate llama dropout accumulated smallest",
    ),
    "rotary angles of the first row turn all": Bug(
        replaced(attention, "Rotation", plants.angles_of_first_row),
        where={"documents": "separate"},
        case="zero3 tp1 full fp32 offload-optimizer separate llama smallest",
    ),
    "attention crosses documents": Bug(
        lambda: patch.object(attention, "causal_mask", lambda *args: None),
        where={"documents": "separate"},
        case="zero3 tp1 full fp32 offload-optimizer separate llama smallest",
    ),
    "recomputation draws other masks": Bug(
        replaced(recompute, "checkpoint", plants.other_masks),
        where={"dropout": "drawn"},
        case="zero2 tp2 full fp32 separate gpt2 drawn unequal smallest clipped",
    ),
    "a tied embedding's gradient is counted once": Bug(
        in_loss(lambda hidden, weight, t, w: (hidden, weight.detach(), t, w)),
        where={"style": "gpt2", "precision": "fp32 fp64"},
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "clipping before the division by the tokens": Bug(
        replaced(base, "clip_gradients", plants.later_clip),
        where={"clip": "on"},
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "tokens go to the next rank": Bug(
        replaced(collectives, "_part_of_sum", plants.next_ranks_tokens),
        where=_SEQUENCE,
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "the copies of hsdp are not added up": Bug(
        replaced(fsdp, "shard", plants.one_replica),
        where={"engine": "hsdp"},
        case="hsdp tp1 selective fp64 offload-all gathered separate mixed dropout smallest",
    ),
    "a bias is added on every tp rank": Bug(
        replaced(tensor, "_rows_forward", plants.bias_everywhere),
        where=_TP,
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "whole parameters are summed over tp": Bug(
        lambda: patch.object(
            layout.TpLayout, "partial", lambda self, name: self.tp_copies(name) > 1
        ),
        where={**_TP, "sequence_parallel": "off"},
        case="zero2 tp2 full fp32 separate gpt2 drawn unequal smallest clipped",
    ),
    "positions do not go on under sequence parallelism": Bug(
        replaced(tensor, "_split_positions", plants.first_part),
        where={**_SEQUENCE, "style": "gpt2"},
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "grouped queries read the next head": Bug(
        replaced(attention, "attend", plants.next_head),
        where={"style": "llama mixed"},
        case="zero3 tp1 full fp32 offload-optimizer separate llama smallest",
    ),
    "ids of other ranks read some row": Bug(
        replaced_method(vocabulary.VocabularyRange, "embed", plants.any_id),
        where=_TP,
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "the vocabulary's padding is in the softmax": Bug(
        lambda: patch.object(
            vocabulary.VocabularyRange,
            "of",
            partial(plants.all_rows, vocabulary.VocabularyRange.of),
        ),
        where=_TP,
        case="fsdp tp2 sequence fp64 joined gpt2 smallest clipped",
    ),
    "gradients are reduced in bf16": Bug(
        replaced(shard, "MixedPrecisionPolicy", plants.reduced_in_bf16),
        where={"engine": "fsdp hsdp", "precision": "fp32 fp64"},
        case="fsdp tp1 selective fp32 separate mixed smallest",
    ),
    "only the last micro-batch counts": Bug(
        replaced_method(fsdp.FsdpEngine, "_micro_step", plants.last_only),
        where={"engine": "fsdp hsdp", "accumulation": "3"},
        case="fsdp tp1 bf16 gathered separate llama dropout accumulated smallest",
    ),
    "norms and biases decay": Bug(
        all_of(
            *(
                replaced(place, "parameter_groups", plants.everything_decays)
                for place in (torch_engine, deepspeed_engine)
            )
        ),
        case="zero3 tp1 full fp32 offload-optimizer separate llama smallest",
    ),
    "stage 3 changes torch's linear": Bug(
        plants.linear_of_stage_3,
        where={"engine": "zero3", "recompute": "selective"},
        case="zero3 tp2 selective fp32 offload-all separate gpt2 dropout unequal largest",
    ),
}
