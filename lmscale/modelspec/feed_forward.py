"""The kinds of feed-forward: the table that the configuration, the model and the planner read.

A feed-forward multiplies hidden states by one or more matrices [F, D], combines the results into one tensor of
F elements per token, and multiplies that by the matrix `down`, [D, F].

To add a kind, add one entry to FEED_FORWARDS and one class to lmscale/model/layers.py; docs/extending.md
describes both. The choices of `model.activation`, the parameters, the memory of the activations and the FLOPs
follow from the entry.

Letters: D hidden size, F hidden size of the feed-forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardKind:
    """One value of `model.activation`.

    The last three fields count tensors of F elements per token, from which the planner computes memory.
    tests/unit/modelspec/test_activations.py compares them with what autograd saves.
    """

    up: tuple[str, ...]  # names of the matrices [F, D], in the order of the model's parameters
    saved: int  # tensors that the backward needs, if nothing is recomputed
    products: (
        int  # results of matrix products with [F, D]; selective recomputation saves all of them
    )
    products_read: int  # how many of these products the backward reads

    @property
    def down(self) -> str:
        """Name of the matrix [D, F]."""
        return "down"

    def default_hidden_size(self, hidden_size: int) -> int:
        """F where model.ffn_hidden_size is null: about 8 D^2 parameters, whatever the number of matrices.

        4 D for two matrices; 8/3 D for three (arXiv:2002.05202), rounded up to a multiple of 64.
        """
        matrices = len(self.up) + 1
        if matrices == 2:
            return 4 * hidden_size
        return -(-(8 * hidden_size) // (matrices * 64)) * 64


FEED_FORWARDS: Mapping[str, FeedForwardKind] = {
    # Saved: gate, silu(gate), up and their product.
    "swiglu": FeedForwardKind(up=("gate", "up"), saved=4, products=2, products_read=2),
    # Saved: input and result of the activation. `gelu` is the exact one (erf), `gelu_tanh` is GPT-2's.
    "gelu": FeedForwardKind(up=("up",), saved=2, products=1, products_read=1),
    "gelu_tanh": FeedForwardKind(up=("up",), saved=2, products=1, products_read=1),
    # Saved: the result only, which both backwards read.
    "relu": FeedForwardKind(up=("up",), saved=1, products=1, products_read=0),
}
