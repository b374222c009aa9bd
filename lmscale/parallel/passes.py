"""The passes over a built model, in the only order that composes.

Activation checkpointing goes inside compilation, so that the compiler sees what is saved and what is
recomputed. Sharding comes last and is the engine's (shard.py), so that one all-gather serves one block.
Splitting tensors over the tp axis will come first.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lmscale.config.sections import EngineConfig
from lmscale.dist.mesh import Mesh


def parallelize(model: nn.Module, mesh: Mesh, *, engine: EngineConfig) -> None:
    """Apply what `engine` asks for, in place. Parameters keep their names and their identity.

    `mesh` is where tensors will be split; the passes of today do not look at it.
    """
    del mesh
    checkpoint_activations(model, engine.activation_checkpointing)
    if engine.compile:
        compile_blocks(model)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The units of activation checkpointing, compilation and sharding, in the order of the forward."""
    decoder = model.get_submodule("decoder")
    return list(decoder.get_submodule("blocks").children())


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Keep only the inputs of blocks and run their forward again in the backward.

    mode: none, full, or every:N (the blocks 0, N, 2N, ...).
    """
    every = _every(mode)
    for index, block in enumerate(blocks(model)):
        if every and index % every == 0:
            _set_forward(block, _checkpointed(block.forward))


def compile_blocks(model: nn.Module) -> None:
    """torch.compile each block on its own: equal blocks share the compiled code, so it is done once.

    Only `forward` is compiled, not the hooks around it: FSDP's gathers stay outside the graph.
    """
    for block in blocks(model):
        _set_forward(block, torch.compile(block.forward, dynamic=False))


def _every(mode: str) -> int:
    match mode.split(":"):
        case ["none"]:
            return 0
        case ["full"]:
            return 1
        case ["every", count]:
            return int(count)
    raise AssertionError(f"activation_checkpointing {mode!r} passed the config check")


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False)

    return run


def _set_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    # On the instance, where a wrapping module would put a prefix before every parameter's name.
    block.forward = forward
