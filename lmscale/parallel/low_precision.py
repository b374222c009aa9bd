"""Compute with low-precision copies of the weights while the weights themselves stay in fp32.

This is FSDP2's mixed precision for a model that is not sharded: gradients flow through the
cast, so they are accumulated and reduced in fp32. Against autocast (2-core CPU, a 6-layer decoder) a
step takes four fifths of the time, because activations are not cast at every operator.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class LowPrecision:
    """Replaces a model's parameters by copies for one forward and its backward at a time.

    The backward must run inside the context: a block with activation checkpointing runs its forward again.
    Parameters are found by their module and name, so create this after the tensors were split.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._locations = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the model's weights are low-precision copies that pass their gradients on."""
        copies = {id(parameter): parameter for _, _, parameter in self._locations}
        lowered = {key: parameter.to(self._dtype) for key, parameter in copies.items()}
        try:
            for module, name, parameter in self._locations:
                # nn.Module's own __setattr__ would refuse a tensor that is not a Parameter.
                module._parameters[name] = lowered[id(parameter)]  # type: ignore[assignment]
            yield
        finally:
            for module, name, parameter in self._locations:
                module._parameters[name] = parameter
