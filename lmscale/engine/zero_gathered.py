"""ZeRO stage 3: each rank keeps a part of every parameter; hooks gather the whole for as long as it is used.

Private names of DeepSpeed read here:

    of a parameter  ds_tensor, ds_shape, ds_numel, ds_process_group
    of DeepSpeedZeroOptimizer_Stage3  fp16_groups, fp32_partitioned_groups_flat, sub_group_to_group_id,
        averaged_gradients, offload_optimizer, grad_position, get_param_id,
        checkpoint_event_prologue, checkpoint_event_epilogue, _reassign_or_swap_out_partitioned_parameters;
        replaced: check_overflow, _get_norm_groups
    of its module parameter_offload  FWD_MODULE_STACK
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmscale.dist.mesh import Mesh
from lmscale.engine.zero_parts import Part, Parts, flatten_groups
from lmscale.engine.zero_start import deepspeed


class GatheredParts(Parts):
    """See Parts. A rank's part of a parameter is one range, the last ranks' shorter or empty."""

    def __init__(
        self, wrapper: Any, model: nn.Module, mesh: Mesh, exact: Mapping[str, Tensor] | None
    ) -> None:
        self._zero = wrapper.optimizer
        self.cut = f"dp {mesh.dp_rank}/{mesh.dp_size}" if mesh.dp_size > 1 else ""
        groups = [cast(Any, parameter).ds_process_group for parameter in model.parameters()]
        assert all(group is mesh.dp_group for group in groups), "DeepSpeed took up other groups"
        self._rank = mesh.dp_rank
        self._places = flatten_groups(self._zero.fp16_groups)
        self._flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        super().__init__(wrapper, model, mesh, exact)
        self._sources = [
            self._places[id(parameter)]
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        self._modules: list[nn.Module] = deepspeed().runtime.zero.parameter_offload.FWD_MODULE_STACK
        self._outside = len(self._modules)
        self._calm()
        _gather_for_head(model)
        if exact is not None:
            self.refresh()

    def gradients(self) -> list[Tensor]:
        """See Parts."""
        if self._zero.offload_optimizer:
            return [part.of(cast(Tensor, part.flat.grad)) for part in self.trainable]
        return [
            self._zero.averaged_gradients[group][place].narrow(0, 0, part.size)
            for part, (group, place) in zip(self.trainable, self._sources, strict=True)
        ]

    def update(self) -> None:
        """See Parts."""
        self._wrapper.step()
        self._leave_modules()

    def refresh(self) -> None:
        """See Parts."""
        self._zero.checkpoint_event_prologue()  # lets go of what is gathered
        super().refresh()
        for index in range(len(self._flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._zero.checkpoint_event_epilogue()  # gathers what shall always be

    def let_go(self) -> None:
        """See Parts. It had begun to gather for the backward."""
        self._zero.checkpoint_event_prologue()
        self._zero.checkpoint_event_epilogue()
        self._leave_modules()

    def held(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """See Parts."""
        stored = cast(Any, parameter).ds_tensor
        start, stop = self._range(parameter)
        return stored.detach().view(-1)[: stop - start], start

    @contextmanager
    def listed(self) -> Iterator[None]:
        """See Parts. DeepSpeed lists one at a time, and only inside its step."""
        groups = self._zero.optimizer.param_groups
        for index, flat in enumerate(self._flats):
            groups[self._zero.sub_group_to_group_id[index]]["params"].append(flat)
        try:
            yield
        finally:
            for group in groups:
                group["params"] = []

    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        start, stop = self._range(parameter)
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        shape = cast(Any, parameter).ds_shape
        return Part(name, shape, start, stop - start, self._flats[group], offset)

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        stored, numel = cast(Any, parameter).ds_tensor, cast(Any, parameter).ds_numel
        start = min(self._rank * stored.ds_numel, numel)
        return start, min(start + stored.ds_numel, numel)

    def _leave_modules(self) -> None:
        """DeepSpeed notes the modules it is in. Recomputation leaves some by an exception, unnoticed: a leak."""
        del self._modules[self._outside :]

    def _calm(self) -> None:
        """Its norm and, in fp16, its look for infinities cannot be switched off: each waits for the device."""
        zero = torch.zeros(())
        self._zero._get_norm_groups = lambda: [zero]
        self._zero.check_overflow = lambda *_, **__: None


def _gather_for_head(model: nn.Module) -> None:
    """The head reads a weight where no hook of DeepSpeed stands: the embedding's, if tied, and all in `logits`."""
    head = model.get_submodule("heads.lm")
    weight = head.weight
    if weight is None:
        weight = cast(nn.Parameter, model.get_submodule("decoder.embedding").weight)
        deepspeed().zero.register_external_parameter(head, weight)
    logits = cast(Any, head).logits

    def gathered(hidden: Tensor, tied: Tensor) -> Tensor:
        with deepspeed().zero.GatheredParameters([weight]):
            return cast(Tensor, logits(hidden, tied))

    cast(Any, head).logits = gathered
