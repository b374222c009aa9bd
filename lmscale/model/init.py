"""Initial values: a pure function of (seed, parameter name, global shape).

Never of the device, the engine, the order in which modules were built, or how a parameter is split,
so every layout of a run starts from the same bits.
"""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from lmscale.model.transformer import LanguageModel
from lmscale.modelspec.parameters import ParameterSpec, parameters


def initial_value(parameter: ParameterSpec, *, seed: int) -> Tensor:
    """The whole parameter, fp32 on the CPU; a layout that stores a part of it slices this.

    Always drawn in fp32, so that an fp64 run starts where the fp32 run does.
    """
    initial = parameter.initial
    match initial.kind:
        case "zeros":
            return torch.zeros(parameter.shape)
        case "ones":
            return torch.ones(parameter.shape)
    generator = _generator(seed, parameter.name)
    value = torch.randn(parameter.shape, generator=generator).mul_(initial.std)
    if initial.num_rows is not None:
        value[initial.num_rows :] = 0  # no gradient ever reaches the padding of the vocabulary
    return value


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value into a parameter that is stored whole."""
    parameter.copy_(value)


@torch.no_grad()
def initialise(
    model: LanguageModel, *, seed: int, write: Callable[[Tensor, Tensor], None] = copy_into
) -> None:
    """Fill every parameter; used after `to_empty` on a model built on the meta device.

    `write(parameter, whole_value)` serves parameters that are shards (DTensors): this package does not know
    layouts. One parameter at a time, so the peak is one whole fp32 parameter.
    """
    specs = {spec.name: spec for spec in parameters(model.spec)}
    for name, parameter in model.named_parameters():
        write(parameter, initial_value(specs[name], seed=seed))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little", signed=True))
