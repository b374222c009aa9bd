"""ZeRO stages 1 and 2: weights are whole on every rank, masters and moments are dealt out.

DeepSpeed has two wrappers for them: BF16_Optimizer for stage 1 in bf16 without offload, which also keeps
whole fp32 gradients, and DeepSpeedZeroOptimizer for everything else.

Private names of DeepSpeed read here: _hp_mapping of a parameter, and of its optimizers

    DeepSpeedZeroOptimizer  single_partition_of_fp32_groups, bit16_groups, params_in_partition,
                            averaged_gradients, cpu_offload, _wait_for_offload_copies; set:
                            compute_grad_norm, check_grad_overflow
    BF16_Optimizer          fp32_groups_flat_partition, fp32_groups_gradient_flat_partition, bf16_groups
"""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from lmscale.dist.mesh import Mesh
from lmscale.engine.zero_parts import Part, Parts, flatten_groups


class SplitParts(Parts):
    """See Parts. Of DeepSpeedZeroOptimizer."""

    _flats_name, _groups_name = "single_partition_of_fp32_groups", "bit16_groups"

    def __init__(
        self, wrapper: Any, model: nn.Module, mesh: Mesh, exact: Mapping[str, Tensor] | None
    ) -> None:
        self._zero = wrapper.optimizer
        assert self._zero.dp_process_group is mesh.dp_group, "DeepSpeed took up other groups"
        self._flats: list[Tensor] = getattr(self._zero, self._flats_name)
        self._places = flatten_groups(getattr(self._zero, self._groups_name))
        self._by_id = {id(p): index for index, p in enumerate(_trainable(model))}
        super().__init__(wrapper, model, mesh, exact)
        self._calm()
        if exact is not None:
            self.refresh()

    def gradients(self) -> list[Tensor]:
        """See Parts."""
        if self._zero.cpu_offload:
            self._zero._wait_for_offload_copies()
            return [part.of(cast(Tensor, part.flat.grad)) for part in self.trainable]
        found = [part.flat.detach()[:0] for part in self.trainable]
        for group, parameters in enumerate(self._zero.params_in_partition):
            # Paddings follow after the parameters' gradients.
            for parameter, gradient in zip(parameters, self._zero.averaged_gradients[group]):  # noqa: B905
                found[self._by_id[id(parameter)]] = gradient
        return found

    def update(self) -> None:
        """See Parts."""
        self._wrapper.step()

    def refresh(self) -> None:
        """See Parts."""
        super().refresh()
        self._zero.update_lp_params()

    def held(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """See Parts."""
        return parameter.detach().view(-1), 0

    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        flat = self._flats[self._places[id(parameter)][0]]
        mapping = cast(Any, parameter)._hp_mapping
        if mapping is None:
            return Part(name, parameter.shape, 0, 0, flat, 0)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Part(name, parameter.shape, there.start, here.numel, flat, here.start)

    def _calm(self) -> None:
        """It is asked for a norm where it insists on one (offload), and looks for infinities in fp16: waits."""
        self._zero.compute_grad_norm = False
        self._zero.check_grad_overflow = False


class Bf16SplitParts(SplitParts):
    """See Parts. Of BF16_Optimizer: its step takes a norm and looks at it, so the update is made here."""

    _flats_name, _groups_name = "fp32_groups_flat_partition", "bf16_groups"

    def gradients(self) -> list[Tensor]:
        """See Parts."""
        flats = self._zero.fp32_groups_gradient_flat_partition
        by_flat = {id(flat): gradient for flat, gradient in zip(self._flats, flats, strict=True)}
        return [part.of(by_flat[id(part.flat)]) for part in self.trainable]

    def update(self) -> None:
        """See Parts."""
        flats = self._zero.fp32_groups_gradient_flat_partition
        for master, gradient in zip(self._flats, flats, strict=True):
            master.grad = gradient
        self._zero.optimizer.step()
        self._zero.update_lp_params()
        self._zero.zero_grad()

    def _calm(self) -> None:
        pass


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
