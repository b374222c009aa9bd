"""How bugs are planted: product functions replaced by wrong ones, for as long as a case runs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from lmscale.engine.deepspeed import setup as zero_start
from lmscale.model import transformer as language
from lmscale.model.layers import replace_forward
from lmscale.parallel import tensor as vocabulary

Plant = Callable[[], AbstractContextManager[Any]]


def replaced(owner: Any, attribute: str, wrong: Callable[..., Any]) -> Plant:
    """Replace a function by `wrong(the function, *its arguments)`."""

    def plant() -> AbstractContextManager[Any]:
        return patch.object(owner, attribute, partial(wrong, getattr(owner, attribute)))

    return plant


def replaced_method(owner: type, attribute: str, wrong: Callable[..., Any]) -> Plant:
    """Likewise a method, which must be a plain function to be bound."""

    def plant() -> AbstractContextManager[Any]:
        right = getattr(owner, attribute)
        return patch.object(owner, attribute, lambda *args, **kwargs: wrong(right, *args, **kwargs))

    return plant


def all_of(*plants: Plant) -> Plant:
    """Plant several at once."""

    @contextmanager
    def plant() -> Iterator[None]:
        with ExitStack() as stack:
            for one in plants:
                stack.enter_context(one())
            yield

    return plant


def in_loss(change: Callable[..., tuple[Any, ...]]) -> Plant:
    """Call the cross entropy with other arguments, with and without a cut vocabulary."""

    def wrong(
        right: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, **rest: Any
    ) -> Any:
        return right(*change(hidden, weight, targets, weights), **rest)

    places = (language, vocabulary)
    return all_of(*(replaced(place, "cross_entropy", wrong) for place in places))


def per_rank_weight(right: Any, micro_batches: Any, mesh: Any) -> Tensor:
    mine = torch.stack([batch.weights_BL.sum(dtype=torch.float64) for batch in micro_batches]).sum()
    return mine * mesh.dp_size


@contextmanager
def doubled(right: Any, self: Any, **how: Any) -> Iterator[None]:
    with right(self, **how):
        yield
    for parameter in self._model.parameters() if torch.is_grad_enabled() else ():
        if parameter.grad is not None:
            parameter.grad *= 2


@contextmanager
def last_only(right: Any, self: Any, **how: Any) -> Iterator[None]:
    for parameter in self._model.parameters() if torch.is_grad_enabled() else ():
        parameter.grad = None
    with right(self, **how):
        yield


def angles_of_first_row(right: Any, positions_BL: Tensor, **rest: Any) -> Any:
    return right(positions_BL[:1].expand_as(positions_BL), **rest)


def without_last(right: Any, self: Any, micro_batches: Any, *, lr: float) -> Any:
    return right(self, micro_batches[:-1], lr=lr)


def other_masks(right: Any, *args: Any, **rest: Any) -> Any:
    return right(*args, preserve_rng_state=False, **rest)


def next_ranks_tokens(right: Any, x_BLD: Tensor, group: Any) -> Tensor:
    return right(x_BLD.roll(x_BLD.shape[1] // group.size(), 1), group)


def one_replica(right: Any, model: Any, mesh: Any, policy: Any) -> Any:
    return right(model, replace(mesh, replicate_size=1), policy)


def reduced_in_bf16(right: Any, **how: Any) -> Any:
    return right(**{**how, "reduce_dtype": torch.bfloat16})


def not_reduced(right: Any, value: Tensor, group: Any, op: str = "sum") -> Tensor:
    return value if op == "max" else right(value, group, op)


def later_clip(right: Any, gradients: Any, result: Any, largest: Any) -> None:
    right(gradients, replace(result, grad_norm=result.grad_norm * result.weight), largest)


def bias_everywhere(right: Any, module: Any, out_of: Any, x: Tensor) -> Tensor:
    return out_of(F.linear(x, module.weight, module.bias))


def first_part(right: Any, positions: Any, mesh: Any) -> None:
    forward = positions.forward
    replace_forward(positions, lambda ids_BL: forward(ids_BL.chunk(mesh.tp_size, 1)[0]))


def next_head(right: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return right(q, k.roll(1, 2), v.roll(1, 2), mask)


def any_id(right: Any, self: Any, ids_BL: Tensor, weight_pD: Tensor) -> Tensor:
    return F.embedding((ids_BL - self.first).clamp(0, self.real - 1), weight_pD)


def all_rows(right: Any, *args: Any, **kwargs: Any) -> Any:
    rows = right(*args, **kwargs)
    return replace(rows, real=rows.stored)


def everything_decays(right: Any, named: Any, weight_decay: float) -> Any:
    return [{"params": [parameter for _, parameter in named], "weight_decay": weight_decay}]


@contextmanager
def linear_of_stage_3() -> Iterator[None]:
    """DeepSpeed's own default puts another F.linear into the process, which adds a bias in place."""

    def wrong(right: Any, *args: Any, **kwargs: Any) -> Any:
        document = right(*args, **kwargs)
        document["zero_optimization"]["memory_efficient_linear"] = True
        return document

    with patch.object(F, "linear", F.linear), replaced(zero_start, "zero_dict", wrong)():
        yield
