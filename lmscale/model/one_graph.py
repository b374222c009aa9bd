"""torch.compile as it is used here: one graph, for each shape that comes, or an error.

torch would rather go on slowly than stop: a graph break cuts a function into pieces, and one that was
compiled for too many shapes runs uncompiled from then on. Both are errors here, since nobody reads logs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from types import FunctionType
from typing import Any, cast

import torch

from lmscale.errors import ConfigError, Problem

# Versions of a function that one run may need, each compiled for seconds: a mode of checkpointing x training, a
# short last micro-batch, evaluation, samples, a batch that DDP begins with.
VERSIONS = 32


def one_graph(*, problem: Callable[[str], Problem]) -> Callable[..., Any]:
    """call(function, *args, **kwargs) -> what the function gives, compiled at the first call with each shape.

    All functions that one `call` is given share its versions, and no other compiled code of the process does.
    problem: the message for a fact, which needs a subject. The call raises ConfigError with it when there is no
    compiler, or the function cannot be compiled as one graph.
    """
    # torch counts versions by code object.
    compiled = torch.compile(
        FunctionType(_call.__code__.replace(), globals()), fullgraph=True, dynamic=False
    )
    return partial(_explained, compiled, problem)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _explained(
    compiled: Callable[..., Any], problem: Callable[[str], Problem], *args: Any, **kwargs: Any
) -> Any:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        with _settings(VERSIONS):
            return compiled(*args, **kwargs)
    except FailOnRecompileLimitHit as error:
        raise ConfigError(
            [problem(f"met more than {VERSIONS} different shapes of input")]
        ) from error
    except TorchDynamoException as error:
        raise ConfigError([problem(f"could not be compiled: {_first(error)}")]) from error


@cache
def _settings(versions: int) -> AbstractContextManager[None]:
    """One patch for all calls: in torch 2.13 each that is made leaves 220 bytes behind for ever."""
    from torch._dynamo import config  # here: it takes two seconds, which only compiled runs pay

    # DDP would cut graphs at the borders of its buckets. A block is small enough to overlap with.
    patch = config.patch(optimize_ddp=False, recompile_limit=versions)
    return cast(AbstractContextManager[None], patch)


def _first(error: BaseException) -> str:
    """The first words of a message of many lines that say what happened."""
    lines = (line.strip() for line in str(error).splitlines())
    said = (line for line in lines if line and not line.endswith("raised:"))
    return next(said, type(error).__name__)
