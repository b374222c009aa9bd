"""The passes over a built model, in the only order that composes.

Tensors are split first, because everything after it works on what this rank stores. Activation checkpointing
goes inside compilation, so that the compiler sees what is saved and what is recomputed. Sharding comes last
and belongs to the engine (shard.py), so that one all-gather serves one block.
"""

from functools import partial

import torch
from torch import nn

from lmscale.base.errors import Problem
from lmscale.config.schema import EngineConfig, ParallelConfig
from lmscale.distributed.mesh import Mesh
from lmscale.model.kernels import one_graph
from lmscale.model.layers import replace_forward
from lmscale.model.transformer import blocks_of
from lmscale.parallel.activation_checkpointing import checkpoint_activations
from lmscale.parallel.tensor import split_tensors

_COMPUTE = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def parallelize(
    model: nn.Module, mesh: Mesh, *, engine: EngineConfig, parallel: ParallelConfig
) -> None:
    """Apply the passes that the run file selects, in place. Parameters keep their names. Not collective.

    Raises ConfigError where activation_checkpointing is a budget that is smaller than any mode needs.
    """
    if mesh.tp_size > 1:
        split_tensors(model, mesh, sequence_parallel=parallel.sequence_parallel)
    compute = _COMPUTE[engine.precision]
    checkpoint_activations(model, engine.activation_checkpointing, compute=compute)
    if engine.compile:
        compile_blocks(model)


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of each block at its first call with each shape; equal blocks share one graph.

    Only `forward` is compiled, not the hooks around it: FSDP's gathers stay outside the graph. The call raises
    ConfigError when there is no compiler, or a block cannot be compiled as one graph.
    """
    call = one_graph(problem=_compile_problem)
    for block in blocks_of(model):
        replace_forward(block, partial(call, block.forward))


def _compile_problem(fact: str) -> Problem:
    hint = (
        "set engine.compile=false, or, where a compiler is missing, install one (g++, or the one that "
        "the variable CXX names)"
    )
    return Problem("engine.compile", f"a block {fact}", hint)
