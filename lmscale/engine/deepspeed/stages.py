"""Where a DeepSpeed engine keeps what this rank updates, described independently of the stage.

    stage   weights            gradients          masters and moments    class
    0       whole              whole, averaged    whole                  Stage0
    1, 2    whole              this rank's range  this rank's range      Stage12, Bf16Stage12
    3       gathered for use   this rank's range  this rank's range      Stage3

DeepSpeed lays parameters end to end in flat tensors (one per parameter group, or one per parameter in
stage 0) and splits these over the data-parallel ranks. Its optimizer sees flat tensors only.

Private names of DeepSpeed that are used here:

    of a parameter            _hp_mapping; in stage 3 ds_tensor, ds_shape, ds_numel, ds_process_group
    of its engine             enable_backward_allreduce (set, stage 0)
    DeepSpeedZeroOptimizer    single_partition_of_fp32_groups, bit16_groups, params_in_partition,
                              averaged_gradients, cpu_offload, _wait_for_offload_copies;
                              set: compute_grad_norm, check_grad_overflow
    BF16_Optimizer            fp32_groups_flat_partition, fp32_groups_gradient_flat_partition, bf16_groups
    DeepSpeedZeroOptimizer_Stage3
                              fp16_groups, fp32_partitioned_groups_flat, sub_group_to_group_id,
                              averaged_gradients, offload_optimizer, grad_position, get_param_id,
                              checkpoint_event_prologue, checkpoint_event_epilogue,
                              _reassign_or_swap_out_partitioned_parameters;
                              replaced: check_overflow, _get_norm_groups
    module parameter_offload  FWD_MODULE_STACK
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lmscale.distributed.mesh import Mesh
from lmscale.engine.deepspeed.setup import bucket_size, deepspeed


@dataclass(frozen=True, slots=True)
class ZeroRange:
    """Elements [start, start + size) of a flattened parameter: what this rank keeps of it."""

    name: str
    shape: torch.Size  # of the parameter on this tp rank
    start: int
    size: int  # 0: the rank keeps nothing of it
    flat: Tensor  # contains its fp32 master; of a trainable parameter also the key of its moments
    offset: int  # in flat

    def select(self, flat: Tensor) -> Tensor:
        """This range of a tensor that is laid out as `flat` is: of the master itself, or of a moment."""
        return flat.detach().view(-1).narrow(0, self.offset, self.size)


class ZeroStage(ABC):
    """The ranges of all parameters on this rank, and how the stage reduces, updates and gathers them.

    Methods are not collective unless they say so.
    """

    gradient_copies = 1  # data-parallel ranks that have the same gradient
    dp_piece = ""  # of Weight.piece: which part of a parameter `stored_weight` is; empty: all of it

    def __init__(
        self, wrapper: Any, model: nn.Module, mesh: Mesh, exact: Mapping[str, Tensor] | None
    ) -> None:
        """`exact`: the parameters as they were before DeepSpeed rounded them; None where it did not."""
        self._wrapper = wrapper
        self._mesh = mesh
        self._rounded = exact is not None
        named = list(model.named_parameters())
        self.trainable = [self._trainable_range(name, p) for name, p in named if p.requires_grad]
        self._frozen_parameters = [(name, p) for name, p in named if not p.requires_grad]
        self.frozen = [self._frozen_range(name, p, exact) for name, p in self._frozen_parameters]
        if exact is not None:
            self._restore_masters(exact)

    @property
    def optimizer_device(self) -> torch.device:
        """The device of masters, moments and gradients."""
        return self.trainable[0].flat.device

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Gradients of `trainable`, in its order, fp32, after the last backward; apply_update reads them."""

    @abstractmethod
    def apply_update(self) -> None:
        """One step of the optimizer, then weights from masters; frees the gradients. Collective."""

    def refresh_weights(self) -> None:
        """Weights from masters that a load has written. Collective."""
        for (_, parameter), part in zip(self._frozen_parameters, self.frozen, strict=True):
            if self._rounded:
                self.stored_weight(parameter)[0].copy_(part.flat)

    @abstractmethod
    def stored_weight(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """(what this rank stores of the weight that it computes with, flat; where that begins)."""

    def reduce_gradients(self) -> None:  # noqa: B027 - most stages reduce in the backward
        """After the last backward of a step. Collective."""

    def release_gathered(self) -> None:  # noqa: B027 - only stage 3 gathers
        """Free weights that a forward without a backward has left gathered. Collective."""

    @contextmanager
    def parameters_attached(self) -> Iterator[None]:
        """Inside, the optimizer's groups contain all flat tensors."""
        yield

    @abstractmethod
    def _trainable_range(self, name: str, parameter: nn.Parameter) -> ZeroRange:
        """The range of a trainable parameter."""

    def _frozen_range(
        self, name: str, parameter: nn.Parameter, exact: Mapping[str, Tensor] | None
    ) -> ZeroRange:
        flat, start = self.stored_weight(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if exact is not None:
            flat = exact[name].view(-1).narrow(0, start, flat.numel()).clone()
        return ZeroRange(name, shape, start, flat.numel(), flat, 0)

    @torch.no_grad()
    def _restore_masters(self, exact: Mapping[str, Tensor]) -> None:
        for part in self.trainable:
            values = exact[part.name].view(-1).narrow(0, part.start, part.size)
            part.select(part.flat).copy_(values)


def _positions_in_groups(groups: Sequence[Sequence[Any]]) -> dict[int, tuple[int, int]]:
    """id of each parameter -> (its group, its position in it)."""
    return {
        id(parameter): (index, position)
        for index, group in enumerate(groups)
        for position, parameter in enumerate(group)
    }


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Stage0(ZeroStage):
    """DeepSpeed only averages gradients.

    In bf16 it would select a wrapper (DDP_BFLOAT16) that accumulates and reduces in bf16 and cannot be
    configured otherwise. So it is configured for fp32 in every precision, and the model computes with
    low-precision copies of its weights (parallel/low_precision.py), as under ddp.
    """

    def __init__(self, wrapper: Any, model: nn.Module, mesh: Mesh) -> None:
        super().__init__(wrapper, model, mesh, exact=None)
        self.gradient_copies = mesh.dp_size
        self._parameters = _trainable(model)
        self._bucket = bucket_size(sum(parameter.numel() for parameter in self._parameters))
        # `reduce_gradients` does it: inside a backward the gradients still belong to the low-precision copies.
        wrapper.enable_backward_allreduce = False

    @override
    def reduce_gradients(self) -> None:
        self._wrapper.allreduce_gradients(bucket_size=self._bucket)

    @override
    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    @override
    def apply_update(self) -> None:
        self._wrapper.step()

    @override
    def stored_weight(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        return parameter.detach().view(-1), 0

    @override
    def _trainable_range(self, name: str, parameter: nn.Parameter) -> ZeroRange:
        return ZeroRange(name, parameter.shape, 0, parameter.numel(), parameter, 0)


class Stage12(ZeroStage):
    """Stages 1 and 2 by DeepSpeedZeroOptimizer: whole weights, split masters and moments."""

    _flats_name, _groups_name = "single_partition_of_fp32_groups", "bit16_groups"

    def __init__(
        self, wrapper: Any, model: nn.Module, mesh: Mesh, exact: Mapping[str, Tensor] | None
    ) -> None:
        self._zero = wrapper.optimizer
        assert self._zero.dp_process_group is mesh.dp_group, "DeepSpeed uses other groups"
        self._flats: list[Tensor] = getattr(self._zero, self._flats_name)
        self._positions = _positions_in_groups(getattr(self._zero, self._groups_name))
        self._index_by_id = {id(p): index for index, p in enumerate(_trainable(model))}
        super().__init__(wrapper, model, mesh, exact)
        self._disable_overflow_checks()
        if exact is not None:
            self.refresh_weights()

    @override
    def gradients(self) -> list[Tensor]:
        if self._zero.cpu_offload:
            self._zero._wait_for_offload_copies()
            return [part.select(cast(Tensor, part.flat.grad)) for part in self.trainable]
        gradients = [part.flat.detach()[:0] for part in self.trainable]
        for group, parameters in enumerate(self._zero.params_in_partition):
            # Padding follows after the parameters' gradients.
            for parameter, gradient in zip(parameters, self._zero.averaged_gradients[group]):  # noqa: B905
                gradients[self._index_by_id[id(parameter)]] = gradient
        return gradients

    @override
    def apply_update(self) -> None:
        self._wrapper.step()

    @override
    def refresh_weights(self) -> None:
        super().refresh_weights()
        self._zero.update_lp_params()

    @override
    def stored_weight(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        return parameter.detach().view(-1), 0

    @override
    def _trainable_range(self, name: str, parameter: nn.Parameter) -> ZeroRange:
        flat = self._flats[self._positions[id(parameter)][0]]
        mapping = cast(Any, parameter)._hp_mapping
        if mapping is None:
            return ZeroRange(name, parameter.shape, 0, 0, flat, 0)
        master, weight = mapping.hp_fragment_address, mapping.lp_fragment_address
        return ZeroRange(name, parameter.shape, weight.start, master.numel, flat, master.start)

    def _disable_overflow_checks(self) -> None:
        """DeepSpeed computes a norm (offload) and checks for inf (fp16); both wait for the device."""
        self._zero.compute_grad_norm = False
        self._zero.check_grad_overflow = False


class Bf16Stage12(Stage12):
    """Stage 1 in bf16 without offload, by BF16_Optimizer.

    Its own step computes a norm and waits for it, so the update is made here.
    """

    _flats_name, _groups_name = "fp32_groups_flat_partition", "bf16_groups"

    @override
    def gradients(self) -> list[Tensor]:
        flats = self._zero.fp32_groups_gradient_flat_partition
        by_flat = {id(flat): gradient for flat, gradient in zip(self._flats, flats, strict=True)}
        return [part.select(by_flat[id(part.flat)]) for part in self.trainable]

    @override
    def apply_update(self) -> None:
        flats = self._zero.fp32_groups_gradient_flat_partition
        for master, gradient in zip(self._flats, flats, strict=True):
            master.grad = gradient
        self._zero.optimizer.step()
        self._zero.update_lp_params()
        self._zero.zero_grad()

    @override
    def _disable_overflow_checks(self) -> None:
        pass


class Stage3(ZeroStage):
    """Each rank keeps one range of every parameter; hooks gather the whole for as long as it is used.

    The ranges of the last ranks are shorter or empty.
    """

    def __init__(
        self, wrapper: Any, model: nn.Module, mesh: Mesh, exact: Mapping[str, Tensor] | None
    ) -> None:
        self._zero = wrapper.optimizer
        self.dp_piece = f"dp {mesh.dp_rank}/{mesh.dp_size}" if mesh.dp_size > 1 else ""
        groups = [cast(Any, parameter).ds_process_group for parameter in model.parameters()]
        assert all(group is mesh.dp_group for group in groups), "DeepSpeed uses other groups"
        self._rank = mesh.dp_rank
        self._positions = _positions_in_groups(self._zero.fp16_groups)
        self._flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        super().__init__(wrapper, model, mesh, exact)
        self._sources = [self._positions[id(parameter)] for parameter in _trainable(model)]
        self._module_stack: list[nn.Module] = (
            deepspeed().runtime.zero.parameter_offload.FWD_MODULE_STACK
        )
        self._stack_depth = len(self._module_stack)
        self._disable_overflow_checks()
        _gather_for_head(model)
        if exact is not None:
            self.refresh_weights()

    @override
    def gradients(self) -> list[Tensor]:
        if self._zero.offload_optimizer:
            return [part.select(cast(Tensor, part.flat.grad)) for part in self.trainable]
        return [
            self._zero.averaged_gradients[group][position].narrow(0, 0, part.size)
            for part, (group, position) in zip(self.trainable, self._sources, strict=True)
        ]

    @override
    def apply_update(self) -> None:
        self._wrapper.step()
        self._clear_module_stack()

    @override
    def refresh_weights(self) -> None:
        self._zero.checkpoint_event_prologue()  # frees what is gathered
        super().refresh_weights()
        for index in range(len(self._flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._zero.checkpoint_event_epilogue()  # gathers what must always be

    @override
    def release_gathered(self) -> None:
        # DeepSpeed has begun to gather for a backward.
        self._zero.checkpoint_event_prologue()
        self._zero.checkpoint_event_epilogue()
        self._clear_module_stack()

    @override
    def stored_weight(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        stored = cast(Any, parameter).ds_tensor
        start, stop = self._range(parameter)
        return stored.detach().view(-1)[: stop - start], start

    @override
    @contextmanager
    def parameters_attached(self) -> Iterator[None]:
        # DeepSpeed attaches one at a time, and only inside its step.
        groups = self._zero.optimizer.param_groups
        for index, flat in enumerate(self._flats):
            groups[self._zero.sub_group_to_group_id[index]]["params"].append(flat)
        try:
            yield
        finally:
            for group in groups:
                group["params"] = []

    @override
    def _trainable_range(self, name: str, parameter: nn.Parameter) -> ZeroRange:
        start, stop = self._range(parameter)
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        shape = cast(Any, parameter).ds_shape
        return ZeroRange(name, shape, start, stop - start, self._flats[group], offset)

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        stored, numel = cast(Any, parameter).ds_tensor, cast(Any, parameter).ds_numel
        start = min(self._rank * stored.ds_numel, numel)
        return start, min(start + stored.ds_numel, numel)

    def _clear_module_stack(self) -> None:
        """DeepSpeed records the modules that it is in; recomputation leaves some by an exception: a leak."""
        del self._module_stack[self._stack_depth :]

    def _disable_overflow_checks(self) -> None:
        """No key switches off its norm and, in fp16, its check for inf; each waits for the device."""
        zero = torch.zeros(())
        self._zero._get_norm_groups = lambda: [zero]
        self._zero.check_overflow = lambda *_, **__: None


def _gather_for_head(model: nn.Module) -> None:
    """The head reads weights where DeepSpeed has no hook: the embedding's, if tied, and all in `logits`."""
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
