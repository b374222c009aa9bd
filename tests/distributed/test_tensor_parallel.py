"""A model whose tensors are split over tp ranks is the model: loss, logits and every gradient, in fp64."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lmscale.base.world import World
from lmscale.config.schema import ModelConfig, ParallelConfig
from lmscale.distributed.mesh import Mesh, make_mesh
from lmscale.distributed.process_group import sum_over
from lmscale.model.build import build_model
from lmscale.model.transformer import LanguageModel
from lmscale.modelspec.tensor_parallel import sums_over_tokens, tp_dim
from lmscale.parallel.tensor import split_tensors
from tests.support.engine_case import rows_of

VOCAB, LENGTH = 61, 12
LLAMA = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 6,
    "ffn_hidden_size": 40,
}
GPT2 = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "norm": "layer", "positions": "learned",
    "activation": "gelu_tanh", "bias": True, "tie_embeddings": True,
}  # fmt: skip
STYLES = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "post": {**GPT2, "norm_order": "post", "tie_embeddings": False},
}


@dataclass(frozen=True)
class Found:
    loss: float
    weight: float
    logits: Tensor
    gradients: dict[str, Tensor] = field(repr=False)


def model_of(style: str, dropout: float) -> LanguageModel:
    config = ModelConfig(**{**STYLES[style], "init_std": 0.3, "dropout": dropout})
    model = build_model(config, vocab_size=VOCAB, max_positions=LENGTH, dtype=torch.float64)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # zero at the start, which would hide one that is added twice
            parameter.data.normal_(generator=draw)
    return model


@cache
def mesh_of(tp: int) -> Mesh:
    rank, size = dist.get_rank(), dist.get_world_size()
    return make_mesh(ParallelConfig(tp=tp), World(rank, rank, size, size), "cpu")


def look(model: LanguageModel, documents: bool) -> Found:
    batch = rows_of(0)
    if not documents:
        stream = batch.inputs
        object.__setattr__(stream, "documents_BL", None)
    torch.manual_seed(11)
    sums = model(batch)
    sums.loss.backward()
    model.eval()
    with torch.no_grad():
        logits_BLV = model.logits(batch)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Found(sums.loss.item(), sums.weight.item(), logits_BLV, found)


def on_ranks(style: str, sequence_parallel: bool, documents: bool, dropout: float) -> Found:
    mesh = mesh_of(dist.get_world_size())
    torch.use_deterministic_algorithms(dropout > 0)
    try:
        model = model_of(style, dropout)
        split_tensors(model, mesh, sequence_parallel=sequence_parallel)
        found = look(model, documents)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, gradient in found.gradients.items():
        if tp_dim(name) is not None:
            parts = [torch.empty_like(gradient) for _ in range(mesh.tp_size)]
            dist.all_gather(parts, gradient)
            found.gradients[name] = torch.cat(parts, tp_dim(name))
        elif sequence_parallel and sums_over_tokens(name):
            found.gradients[name] = sum_over(gradient)
    return found


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize(
    ("style", "documents", "dropout"),
    [("llama", True, 0.0), ("gpt2", False, 0.0), ("post", True, 0.2)],
)
def test_split_tensors_give_the_model(ranks, style, tp, sequence_parallel, documents, dropout):
    torch.use_deterministic_algorithms(dropout > 0)
    try:
        wanted = look(model_of(style, dropout), documents)
    finally:
        torch.use_deterministic_algorithms(False)
    for found in ranks(tp)(on_ranks, style, sequence_parallel, documents, dropout):
        assert found.loss == pytest.approx(wanted.loss, rel=1e-12)
        assert found.weight == wanted.weight
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-11, atol=1e-11)
        assert found.gradients.keys() == wanted.gradients.keys()
        for name, gradient in wanted.gradients.items():
            largest = gradient.abs().max().clamp(min=1e-3)
            assert (found.gradients[name] - gradient).abs().max() < 1e-11 * largest, name


def _bits(style: str, sequence_parallel: bool) -> dict[str, Any]:
    """What must be the same bits on each tp rank: gradients of whole parameters, loss and logits."""
    model = model_of(style, 0.0).float()
    split_tensors(model, mesh_of(dist.get_world_size()), sequence_parallel=sequence_parallel)
    found = look(model, documents=True)
    whole = {n: g for n, g in found.gradients.items() if tp_dim(n) is None}
    return {"loss": found.loss, "logits": found.logits, **({} if sequence_parallel else whole)}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_what_is_whole_is_bitwise_the_same_on_every_rank(ranks, style, sequence_parallel):
    first, *others = ranks(4)(_bits, style, sequence_parallel)
    for other in others:
        assert other["loss"] == first["loss"]
        for name in first.keys() - {"loss"}:
            assert torch.equal(other[name], first[name]), name
