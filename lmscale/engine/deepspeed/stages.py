"""Where a DeepSpeed engine keeps what this rank updates, in words that do not depend on the stage.

    stage   weights            gradients                  masters and moments    file
    0       whole              whole, averaged            whole                  zero_whole.py
    1, 2    whole              of the part                of the part            zero_split.py
    3       gathered for use   of the part                of the part            zero_gathered.py

DeepSpeed lays parameters end to end in flat tensors (one a parameter group, or one a parameter in stage 0) and
deals these out over the data-parallel ranks. Its optimizer sees flat tensors only.

ZeRO stage 0: DeepSpeed only averages gradients.

In bf16 it would pick a wrapper (DDP_BFLOAT16) that accumulates and reduces in bf16, and refuse to be told
otherwise. So it is told fp32 in every precision, and the model computes with low-precision copies of its
weights (parallel/lowered.py), as under ddp.

ZeRO stages 1 and 2: weights are whole on every rank, masters and moments are dealt out.

DeepSpeed has two wrappers for them: BF16_Optimizer for stage 1 in bf16 without offload, which also keeps
whole fp32 gradients, and DeepSpeedZeroOptimizer for everything else.

Private names of DeepSpeed read here: _hp_mapping of a parameter, and of its optimizers

    DeepSpeedZeroOptimizer  single_partition_of_fp32_groups, bit16_groups, params_in_partition,
                            averaged_gradients, cpu_offload, _wait_for_offload_copies; set:
                            compute_grad_norm, check_grad_overflow
    BF16_Optimizer          fp32_groups_flat_partition, fp32_groups_gradient_flat_partition, bf16_groups

ZeRO stage 3: each rank keeps a part of every parameter; hooks gather the whole for as long as it is used.

Private names of DeepSpeed read here:

    of a parameter  ds_tensor, ds_shape, ds_numel, ds_process_group
    of DeepSpeedZeroOptimizer_Stage3  fp16_groups, fp32_partitioned_groups_flat, sub_group_to_group_id,
        averaged_gradients, offload_optimizer, grad_position, get_param_id,
        checkpoint_event_prologue, checkpoint_event_epilogue, _reassign_or_swap_out_partitioned_parameters;
        replaced: check_overflow, _get_norm_groups
    of its module parameter_offload  FWD_MODULE_STACK
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmscale.distributed.mesh import Mesh
from lmscale.engine.deepspeed.setup import bucket_size, deepspeed


@dataclass(frozen=True, slots=True)
class ZeroRange:
    """Elements [start, start + size) of a flattened parameter: what this rank keeps of it."""

    name: str
    shape: torch.Size  # of the parameter on this tp rank
    start: int
    size: int  # 0: the rank keeps nothing of it
    flat: Tensor  # where its fp32 master lies; of a trainable one also the key of its moments
    offset: int  # in flat

    def of(self, flat: Tensor) -> Tensor:
        """This part, taken out of something laid out as `flat` is: the master itself, or a moment."""
        return flat.detach().view(-1).narrow(0, self.offset, self.size)


class ZeroRanges(ABC):
    """The parts of all parameters on this rank. Methods without a word about it are not collective."""

    gradient_copies = 1  # data-parallel ranks that hold the same gradient
    cut = ""  # of Weight.piece: which part of a parameter `held` is; empty: all of it

    def __init__(
        self, wrapper: Any, model: nn.Module, mesh: Mesh, exact: Mapping[str, Tensor] | None
    ) -> None:
        """`exact`: the parameters as they were before DeepSpeed rounded them; None where it did not."""
        self._wrapper = wrapper
        self._mesh = mesh
        self._rounded = exact is not None
        named = list(model.named_parameters())
        self.trainable = [self._part(name, p) for name, p in named if p.requires_grad]
        self._still = [(name, p) for name, p in named if not p.requires_grad]
        self.frozen = [self._frozen(name, p, exact) for name, p in self._still]
        if exact is not None:
            self._restore(exact)

    @property
    def home(self) -> torch.device:
        """Where the optimizer works."""
        return self.trainable[0].flat.device

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Of `trainable`, in its order, fp32, after the last backward; `update` reads them from there."""

    @abstractmethod
    def update(self) -> None:
        """One step of the optimizer, then weights from masters, then no gradient is left. Collective."""

    def refresh(self) -> None:
        """Weights from masters, which somebody has written. Collective."""
        for (_, parameter), part in zip(self._still, self.frozen, strict=True):
            if self._rounded:
                self.held(parameter)[0].copy_(part.flat)

    @abstractmethod
    def held(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """What this rank keeps of the weight that it computes with, flat, and where that begins."""

    def reduce(self) -> None:  # noqa: B027 - nothing to do is the rule
        """After the last backward of a step; most stages have reduced in the backward. Collective."""

    def let_go(self) -> None:  # noqa: B027
        """Of weights that a forward without a backward has left gathered. Collective."""

    @contextmanager
    def listed(self) -> Iterator[None]:
        """Inside, the optimizer's groups list all flat tensors."""
        yield

    @abstractmethod
    def _part(self, name: str, parameter: nn.Parameter) -> ZeroRange:
        """Of a trainable parameter."""

    def _frozen(
        self, name: str, parameter: nn.Parameter, exact: Mapping[str, Tensor] | None
    ) -> ZeroRange:
        flat, start = self.held(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if exact is not None:
            flat = exact[name].view(-1).narrow(0, start, flat.numel()).clone()
        return ZeroRange(name, shape, start, flat.numel(), flat, 0)

    @torch.no_grad()
    def _restore(self, exact: Mapping[str, Tensor]) -> None:
        for part in self.trainable:
            part.of(part.flat).copy_(exact[part.name].view(-1).narrow(0, part.start, part.size))


def flatten_groups(groups: Sequence[Sequence[Any]]) -> dict[int, tuple[int, int]]:
    """id of each parameter -> (its group, its place there)."""
    return {
        id(parameter): (index, place)
        for index, group in enumerate(groups)
        for place, parameter in enumerate(group)
    }


class Stage0Ranges(ZeroRanges):
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

    def _part(self, name: str, parameter: nn.Parameter) -> ZeroRange:
        return ZeroRange(name, parameter.shape, 0, parameter.numel(), parameter, 0)


class Stage12Ranges(ZeroRanges):
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

    def _part(self, name: str, parameter: nn.Parameter) -> ZeroRange:
        flat = self._flats[self._places[id(parameter)][0]]
        mapping = cast(Any, parameter)._hp_mapping
        if mapping is None:
            return ZeroRange(name, parameter.shape, 0, 0, flat, 0)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return ZeroRange(name, parameter.shape, there.start, here.numel, flat, here.start)

    def _calm(self) -> None:
        """It is asked for a norm where it insists on one (offload), and looks for infinities in fp16: waits."""
        self._zero.compute_grad_norm = False
        self._zero.check_grad_overflow = False


class Bf16Stage12Ranges(Stage12Ranges):
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


class Stage3Ranges(ZeroRanges):
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

    def _part(self, name: str, parameter: nn.Parameter) -> ZeroRange:
        start, stop = self._range(parameter)
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        shape = cast(Any, parameter).ds_shape
        return ZeroRange(name, shape, start, stop - start, self._flats[group], offset)

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
