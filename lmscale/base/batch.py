"""What flows from data to model and back: Stream, Batch, Sums. Generic in the array type.

numpy arrays in data/, torch tensors after `Batch.map`; this file imports neither.

Shapes: B rows of this micro-batch on this rank, L tokens a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

A = TypeVar("A")
X = TypeVar("X")


@dataclass(frozen=True, slots=True)
class Stream(Generic[A]):
    """A batch of token rows as one side of the model sees them."""

    tokens_BL: A  # int64
    positions_BL: A  # int64, restart at 0 in each document
    documents_BL: (
        A | None
    )  # int64; equal ids attend to each other, -1 pads. None: one document a row

    def map(self, convert: Callable[[A], X]) -> "Stream[X]":
        """The same stream with every array converted."""
        documents = None if self.documents_BL is None else convert(self.documents_BL)
        return Stream(convert(self.tokens_BL), convert(self.positions_BL), documents)


@dataclass(frozen=True, slots=True)
class Batch(Generic[A]):
    """One micro-batch of one data-parallel rank. Targets are given: the model never shifts."""

    inputs: Stream[A]
    source: Stream[A] | None  # encoder side; None for a decoder-only model
    targets_BL: A  # int64
    weights_BL: A  # float32; 0 = no target here
    rows_B: A  # int64: global sample position of the row, -1 = filler

    def map(self, convert: Callable[[A], X]) -> "Batch[X]":
        """The same batch with every array converted, e.g. numpy -> tensor on a device."""
        source = None if self.source is None else self.source.map(convert)
        return Batch(
            self.inputs.map(convert),
            source,
            convert(self.targets_BL),
            convert(self.weights_BL),
            convert(self.rows_B),
        )


class Sums(NamedTuple, Generic[A]):
    """What the model returns: sums, so that any split of the batch adds up to the same loss.

    A NamedTuple because FSDP and DDP look for the tensors of a module's output in pytrees.
    """

    loss: A  # scalar: sum over targets of weight * negative log likelihood (nats)
    weight: A  # scalar: sum of weights
