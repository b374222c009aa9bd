"""How operators are computed: the precision inside them, and compilation as one graph or an error.

torch.compile would rather run slowly than stop: a graph break splits a function into pieces, and a function that
was compiled for too many shapes runs uncompiled from then on. Both are errors here, since a warning in a log is
easily missed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from types import FunctionType
from typing import Any, cast

import torch

from lmscale.base.errors import ConfigError, Problem

# Compiled versions of a function that one run may need, each of which takes seconds: modes of checkpointing x
# training, a short last micro-batch, evaluation, samples, a batch that DDP begins with.
VERSIONS = 32


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums, angles and losses of values stored as `dtype`.

    `.float()` in their place would be a downcast in an fp64 run.
    """
    return torch.promote_types(dtype, torch.float32)


def one_graph(*, problem: Callable[[str], Problem]) -> Callable[..., Any]:
    """A `call(function, *args, **kwargs)` that compiles the function at the first call with each shape.

    All functions passed to the same `call` share its versions, and no other compiled code of the process does.
    problem: makes the error from what happened. The call raises ConfigError with it when there is no compiler,
    or when the function cannot be compiled as one graph.
    """
    # torch counts versions per code object, so each `call` has a code object of its own.
    compiled = torch.compile(
        FunctionType(_call.__code__.replace(), globals()), fullgraph=True, dynamic=False
    )
    return partial(_call_compiled, compiled, problem)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _call_compiled(
    compiled: Callable[..., Any], problem: Callable[[str], Problem], *args: Any, **kwargs: Any
) -> Any:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        with _compiler_settings(VERSIONS):
            return compiled(*args, **kwargs)
    except FailOnRecompileLimitHit as error:
        raise ConfigError(
            [problem(f"met more than {VERSIONS} different shapes of input")]
        ) from error
    except TorchDynamoException as error:
        raise ConfigError([problem(f"could not be compiled: {_summary(error)}")]) from error


@cache
def _compiler_settings(versions: int) -> AbstractContextManager[None]:
    """One patch for all calls: in torch 2.13 each new one leaks 220 bytes."""
    from torch._dynamo import (
        config,
    )  # imported here: it takes two seconds, which only compiled runs pay

    # DDP would split graphs at the borders of its buckets. A block is small enough to overlap with.
    patch = config.patch(optimize_ddp=False, recompile_limit=versions)
    return cast(AbstractContextManager[None], patch)


def _summary(error: BaseException) -> str:
    """The first line of a long message that describes what happened."""
    lines = (line.strip() for line in str(error).splitlines())
    messages = (line for line in lines if line and not line.endswith("raised:"))
    return next(messages, type(error).__name__)
