"""torch.compile of each block: one graph that all equal blocks share, or an error (model/one_graph.py)."""

from functools import partial

from torch import nn

from lmscale.base.errors import Problem
from lmscale.model.attention import one_graph
from lmscale.parallel.blocks import blocks, set_forward


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of each block at its first call, anew for each shape of its input.

    Only `forward` is compiled, not the hooks around it: FSDP's gathers stay outside the graph. The call raises
    ConfigError when there is no compiler, or a block cannot be compiled as one piece.
    """
    call = one_graph(problem=_problem)
    for block in blocks(model):
        set_forward(block, partial(call, block.forward))


def _problem(fact: str) -> Problem:
    hint = (
        "set engine.compile=false, or, where a compiler is missing, give the machine one (g++, or the one that "
        "the variable CXX names)"
    )
    return Problem("engine.compile", f"a block {fact}", hint)
