"""From the run file's model section to a model, and how many parameters it has."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from lmscale.base.errors import ConfigError, Problem
from lmscale.config.model_spec import decoder_spec
from lmscale.config.schema import ModelConfig
from lmscale.model.init import initialise
from lmscale.model.transformer import LanguageModel


def build_model(
    cfg: ModelConfig,
    *,
    vocab_size: int,
    max_positions: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LanguageModel:
    """The model of this section, initialised; on the meta device, without values (see initialise).

    Neither reads nor changes the global random state. Raises ConfigError for a pattern of model.trainable that
    matches no parameter.
    """
    spec = decoder_spec(cfg, vocab_size=vocab_size, max_positions=max_positions)
    with torch.device("meta"):
        model = LanguageModel(spec).to(dtype)
    freeze(model, cfg.trainable)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        initialise(model, seed=seed)
    return model


def freeze(model: LanguageModel, trainable: Sequence[str]) -> None:
    """Turn off the gradient of every parameter that matches none of the name patterns."""
    names = [name for name, _ in model.named_parameters()]
    problems = [
        Problem(
            "model.trainable",
            f"{pattern!r} matches no parameter",
            f"names look like {names[0]} and {names[-1]}; * matches anything",
        )
        for pattern in trainable
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if problems or not trainable:
        raise ConfigError(problems or [Problem("model.trainable", "empty: nothing would train")])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trainable))


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of parameters of a built model."""

    total: int
    trainable: int
    non_embedding: int  # without token and position tables; an untied head counts


def num_parameters(model: nn.Module) -> ParameterCounts:
    """Count a model's parameters, by global shape where they are sharded."""
    sizes = {name: parameter.shape.numel() for name, parameter in model.named_parameters()}
    tables = ("decoder.embedding.weight", "decoder.positions.weight")
    return ParameterCounts(
        total=sum(sizes.values()),
        trainable=sum(p.shape.numel() for p in model.parameters() if p.requires_grad),
        non_embedding=sum(size for name, size in sizes.items() if name not in tables),
    )
