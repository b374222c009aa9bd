"""Compute with low-precision copies of the weights while the weights themselves stay in fp32.

What FSDP2's mixed precision does for a sharded model, for one that is not: gradients flow through the
cast, so they are accumulated and reduced in fp32. Against autocast (2-core CPU, a 6-layer decoder) a
step takes four fifths of the time, because activations are not cast at every operator.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class LowPrecision:
    """Puts copies in the place of a model's parameters, for one forward and its backward at a time.

    The backward belongs inside: a block whose activations are checkpointed runs its forward again.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the model's weights are low-precision copies that pass their gradients on."""
        copies = {id(parameter): parameter for _, _, parameter in self._places}
        lowered = {key: parameter.to(self._dtype) for key, parameter in copies.items()}
        try:
            for module, name, parameter in self._places:
                # nn.Module's own __setattr__ would refuse a tensor that is no Parameter.
                module._parameters[name] = lowered[id(parameter)]  # type: ignore[assignment]
            yield
        finally:
            for module, name, parameter in self._places:
                module._parameters[name] = parameter
