"""The passes over a built model, in the only order that composes.

Tensors are split first, because everything after it works on what this rank holds. Activation checkpointing
goes inside compilation, so that the compiler sees what is saved and what is recomputed. Sharding comes last
and is the engine's (shard.py), so that one all-gather serves one block.
"""

import torch
from torch import nn

from lmscale.config.schema import EngineConfig, ParallelConfig
from lmscale.distributed.mesh import Mesh
from lmscale.parallel.activation_checkpointing import checkpoint_activations
from lmscale.parallel.compile import compile_blocks
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
    """Apply what the run file asks for, in place. Parameters keep their names.

    Raises ConfigError where activation_checkpointing asks for less memory than any mode needs.
    """
    if mesh.tp_size > 1:
        split_tensors(model, mesh, sequence_parallel=parallel.sequence_parallel)
    compute = _COMPUTE[engine.precision]
    checkpoint_activations(model, engine.activation_checkpointing, compute=compute)
    if engine.compile:
        compile_blocks(model)
