"""torch.compile of each block: one graph that all equal blocks share, or an error.

torch would rather go on slowly than stop: a graph break cuts the block into pieces, and a function that was
compiled for too many shapes runs uncompiled from then on. Both are errors here, since nobody reads logs.
"""

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lmscale.errors import ConfigError, Problem
from lmscale.parallel.blocks import blocks, set_forward

# Versions of a block that one run may need, each compiled for seconds: a mode of checkpointing x training, a
# short last micro-batch, evaluation, samples, a batch that DDP begins with.
VERSIONS = 32


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of each block at its first call, anew for each shape of its input.

    Only `forward` is compiled, not the hooks around it: FSDP's gathers stay outside the graph. The call raises
    ConfigError when there is no compiler, or a block cannot be compiled as one piece.
    """
    # torch counts versions by code object: one for all blocks, and none that other models of the process compile.
    call = FunctionType(_call.__code__.replace(), globals())
    compiled = torch.compile(call, fullgraph=True, dynamic=False)
    for block in blocks(model):
        set_forward(block, partial(_explained, compiled, block.forward))


def _call(forward: Callable[..., Any], *args: Any) -> Any:
    return forward(*args)


def _explained(compiled: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    from torch._dynamo import config  # here: it takes two seconds, which only compiled runs pay
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        # DDP would cut graphs at the borders of its buckets. A block is small enough to overlap with.
        with config.patch(optimize_ddp=False, recompile_limit=VERSIONS):
            return compiled(forward, *args)
    except FailOnRecompileLimitHit as error:
        fact = f"a block met more than {VERSIONS} different shapes of input"
        raise ConfigError([_problem(fact)]) from error
    except TorchDynamoException as error:
        raise ConfigError([_problem(f"a block could not be compiled: {_first(error)}")]) from error


def _problem(fact: str) -> Problem:
    hint = (
        "set engine.compile=false, or give the machine a working C++ compiler (g++, or the one that the "
        "variable CXX names)"
    )
    return Problem("engine.compile", fact, hint)


def _first(error: BaseException) -> str:
    """The first words of a message of many lines."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
