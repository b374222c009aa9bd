"""Initial values: a pure function of (seed, parameter name, global shape).

Never of the device, the engine, the order in which modules were built, or how a parameter is cut,
so every layout of a run starts from the same bits.
"""

from collections.abc import Callable
from hashlib import blake2b
from math import sqrt

import torch
from torch import Tensor

from lmscale.model.transformer import LanguageModel
from lmscale.modelspec.spec import Architecture

# The two matrices that write into the residual stream: scaled by 1/sqrt(2 * layers), so that its
# variance does not grow with depth (GPT-2, section 2.3).
_RESIDUAL = ("attention.out.weight", "feed_forward.down.weight")


def initial_value(name: str, shape: tuple[int, ...], *, arch: Architecture, seed: int) -> Tensor:
    """The full parameter, fp32 on the CPU; a layout that holds a part of it slices this.

    Always drawn in fp32, so that an fp64 run starts where the fp32 run does.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if ".norm" in name:
        return torch.ones(shape)
    std = arch.init_std
    if name.endswith(_RESIDUAL):
        std /= sqrt(2 * arch.num_layers)
    value = torch.randn(shape, generator=_generator(seed, name)).mul_(std)
    if name in ("decoder.embedding.weight", "heads.lm.weight"):
        value[arch.vocab_size :] = 0  # the padding of the vocabulary: no gradient ever reaches it
    return value


def copy_into(parameter: Tensor, value: Tensor) -> None:
    """Write a full value into a parameter that is held whole."""
    parameter.copy_(value)


@torch.no_grad()
def initialise(
    model: LanguageModel, *, seed: int, write: Callable[[Tensor, Tensor], None] = copy_into
) -> None:
    """Fill every parameter; used after `to_empty` on a model built on the meta device.

    `write(parameter, full_value)` is the seam for parameters that are shards (DTensors): this room
    knows nothing of layouts. One parameter at a time, so the peak is one full fp32 parameter.
    """
    for name, parameter in model.named_parameters():
        write(parameter, initial_value(name, tuple(parameter.shape), arch=model.arch, seed=seed))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little", signed=True))
