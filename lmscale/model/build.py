"""From the run file's model section to a model."""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from lmscale.base.errors import ConfigError, Problem
from lmscale.model.init import initialise
from lmscale.model.transformer import LanguageModel
from lmscale.modelspec.spec import Architecture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmscale.config.schema import ModelConfig


def build_model(
    cfg: "ModelConfig",
    *,
    vocab_size: int,
    max_positions: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LanguageModel:
    """The model of this section, initialised; on the meta device, without values (see initialise).

    The global random state is neither read nor moved.
    """
    arch = Architecture.of(cfg, vocab_size=vocab_size, max_positions=max_positions)
    with torch.device("meta"):
        model = LanguageModel(arch).to(dtype)
    freeze(model, cfg.trainable)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        initialise(model, seed=seed)
    return model


def freeze(model: LanguageModel, trainable: "Sequence[str]") -> None:
    """Take the gradient from every parameter that matches none of the name patterns."""
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
