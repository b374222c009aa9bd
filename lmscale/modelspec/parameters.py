"""The parameters of a model: names, global shapes, initial values, decay and tensor-parallel split.

Nothing is built here. The model takes its initial values from this list, and a test compares names and shapes
with those of the built model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod, sqrt
from typing import Literal

from lmscale.modelspec.spec import (
    AttentionSpec,
    BranchSpec,
    FeedForwardSpec,
    ModelSpec,
    NormSpec,
    StackSpec,
)
from lmscale.modelspec.tensor_parallel import tp_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialValue:
    """What a parameter starts from."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0  # of normal
    num_rows: int | None = (
        None  # later rows are zero: the padding of the vocabulary; None: no such rows
    )


_ZEROS, _ONES = InitialValue(kind="zeros"), InitialValue(kind="ones")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """One tensor of the model under its global shape."""

    name: str
    shape: tuple[int, ...]
    initial: InitialValue
    trainable: bool = True

    @property
    def size(self) -> int:
        """Its number of elements."""
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies to it."""
        return decays(len(self.shape))

    @property
    def block(self) -> str | None:
        """Name of the block that it belongs to; None for embeddings, last norms and heads."""
        words = self.name.split(".")
        return ".".join(words[:3]) if words[1] == "blocks" else None

    def tp_slice(self, tp: int) -> "ParameterSpec":
        """What the first of `tp` ranks has of it."""
        dim = tp_dim(self.name)
        if dim is None or tp == 1:
            return self
        shape = tuple(-(-n // tp) if i == dim else n for i, n in enumerate(self.shape))
        return replace(self, shape=shape)


def decays(num_dimensions: int) -> bool:
    """Whether weight decay applies to a parameter with this many dimensions.

    Matrices decay, embeddings included (as in nanoGPT and litgpt); norms and biases do not. The rule never
    reads a name, so it is valid for every layout that keeps the number of dimensions.
    """
    return num_dimensions >= 2


def parameters(spec: ModelSpec) -> tuple[ParameterSpec, ...]:
    """Every parameter, in the order of the model. A tied head is the embedding and is listed once."""
    return tuple(
        replace(
            parameter,
            trainable=any(fnmatchcase(parameter.name, pattern) for pattern in spec.trainable),
        )
        for parameter in _all(spec)
    )


def trainable(parameters: Iterable[ParameterSpec]) -> list[ParameterSpec]:
    """Those that are trained."""
    return [parameter for parameter in parameters if parameter.trainable]


def num_elements(parameters: Iterable[ParameterSpec]) -> int:
    """Elements of all of them."""
    return sum(parameter.size for parameter in parameters)


def _all(spec: ModelSpec) -> Iterator[ParameterSpec]:
    for stack in spec.stacks:
        yield from _stack(stack, spec.init_std)
    for head in spec.heads:
        if not head.tied:
            yield _vocabulary(spec.stack(head.stack), f"heads.{head.name}", spec.init_std)


def _stack(stack: StackSpec, std: float) -> Iterator[ParameterSpec]:
    yield _vocabulary(stack, f"{stack.name}.embedding", std)
    if stack.positions == "learned":
        yield ParameterSpec(
            name=f"{stack.name}.positions.weight",
            shape=(stack.max_positions, stack.hidden_size),
            initial=InitialValue(kind="normal", std=std),
        )
    for index in range(stack.num_layers):
        for name, branch in stack.block.branches:
            prefix = f"{stack.name}.blocks.{index}"
            yield from _norm(stack.block.norm, f"{prefix}.norm_{name}", stack.hidden_size)
            yield from _branch(stack, branch, f"{prefix}.{name}", std)
    if stack.final_norm:
        yield from _norm(stack.block.norm, f"{stack.name}.norm", stack.hidden_size)


def _vocabulary(stack: StackSpec, module: str, std: float) -> ParameterSpec:
    return ParameterSpec(
        name=f"{module}.weight",
        shape=(stack.padded_vocab_size, stack.hidden_size),
        initial=InitialValue(kind="normal", std=std, num_rows=stack.vocab_size),
    )


def _norm(norm: NormSpec, module: str, size: int) -> Iterator[ParameterSpec]:
    yield ParameterSpec(name=f"{module}.weight", shape=(size,), initial=_ONES)
    if norm.kind == "layer" and norm.bias:
        yield ParameterSpec(name=f"{module}.bias", shape=(size,), initial=_ZEROS)


def _branch(
    stack: StackSpec, branch: BranchSpec, module: str, std: float
) -> Iterator[ParameterSpec]:
    """The last matrix writes into the residual stream: it is scaled so that the variance does not grow with depth.

    By 1/sqrt(2 * layers), as in GPT-2, section 2.3.
    """
    *first, last = matrices(stack.hidden_size, branch)
    for name, out_size, in_size in first:
        yield from _linear(f"{module}.{name}", out_size, in_size, std=std, bias=branch.bias)
    name, out_size, in_size = last
    std /= sqrt(2 * stack.num_layers)
    yield from _linear(f"{module}.{name}", out_size, in_size, std=std, bias=branch.bias)


def matrices(hidden_size: int, branch: BranchSpec) -> tuple[tuple[str, int, int], ...]:
    """Name, outputs and inputs of each linear layer of a branch; the last one gives the branch's output."""
    match branch:
        case AttentionSpec(query_size=query_size, kv_size=kv_size):
            return (
                ("q", query_size, hidden_size),
                ("k", kv_size, hidden_size),
                ("v", kv_size, hidden_size),
                ("out", hidden_size, query_size),
            )
        case FeedForwardSpec(properties=kind, hidden_size=inner):
            up = ((name, inner, hidden_size) for name in kind.up)
            return (*up, (kind.down, hidden_size, inner))


def _linear(
    module: str, out_size: int, in_size: int, *, std: float, bias: bool
) -> Iterator[ParameterSpec]:
    yield ParameterSpec(
        name=f"{module}.weight",
        shape=(out_size, in_size),
        initial=InitialValue(kind="normal", std=std),
    )
    if bias:
        yield ParameterSpec(name=f"{module}.bias", shape=(out_size,), initial=_ZEROS)
