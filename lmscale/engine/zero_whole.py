"""ZeRO stage 0: DeepSpeed only averages gradients.

In bf16 it would pick a wrapper (DDP_BFLOAT16) that accumulates and reduces in bf16, and refuse to be told
otherwise. So it is told fp32 in every precision, and the model computes with low-precision copies of its
weights (parallel/lowered.py), as under ddp.
"""

from typing import Any

from torch import Tensor, nn

from lmscale.dist.mesh import Mesh
from lmscale.engine.zero_dict import bucket_size
from lmscale.engine.zero_parts import Part, Parts


class WholeParts(Parts):
    """See Parts. Private name of the DeepSpeed engine, set: enable_backward_allreduce."""

    def __init__(self, wrapper: Any, model: nn.Module, mesh: Mesh) -> None:
        super().__init__(wrapper, model, mesh, exact=None)
        self.gradient_copies = mesh.dp_size
        self._owned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._bucket = bucket_size(sum(parameter.numel() for parameter in self._owned))
        # By hand, outside of the copies' reach: in a backward the model has no gradients of its own.
        wrapper.enable_backward_allreduce = False

    def reduce(self) -> None:
        """See Parts."""
        self._wrapper.allreduce_gradients(bucket_size=self._bucket)

    def gradients(self) -> list[Tensor]:
        """See Parts."""
        return [parameter.grad for parameter in self._owned if parameter.grad is not None]

    def update(self) -> None:
        """See Parts."""
        self._wrapper.step()

    def held(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """See Parts."""
        return parameter.detach().view(-1), 0

    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        return Part(name, parameter.shape, 0, parameter.numel(), parameter, 0)
