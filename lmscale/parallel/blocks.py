"""What passes change: the blocks of a model, and how."""

from collections.abc import Callable
from typing import Any

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The units of activation checkpointing, compilation and sharding, in the order of the forward."""
    decoder = model.get_submodule("decoder")
    return list(decoder.get_submodule("blocks").children())


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace what a module computes. Its hooks stay around it, its parameters keep their names."""
    # On the instance, where a wrapping module would put a prefix before every parameter's name.
    module.forward = forward
