"""Small models and batches, and the fixture with which their tests run on one thread."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lmscale.base.batch import Batch, Stream
from lmscale.config.schema import ModelConfig
from lmscale.model.build import build_model
from lmscale.model.transformer import LanguageModel

VOCAB = 50  # not a multiple of 128: the padding is there in every test
POSITIONS = 32

# Every switch of ModelConfig is in at least two of these.
VARIANTS = {
    "llama": {},
    "gqa": {"num_kv_heads": 2, "head_dim": 6, "rope_theta": 500.0},
    "gpt2": {
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu",
        "bias": True,
        "tie_embeddings": True,
    },
    "post": {"norm": "layer", "norm_order": "post", "positions": "learned", "activation": "relu"},
    "bare": {"positions": "none", "num_kv_heads": 1, "bias": True, "norm_order": "post"},
}


def config(**changes: object) -> ModelConfig:
    base = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 4,
        "ffn_hidden_size": 24,
        "init_std": 0.2,
    }
    return ModelConfig(**{**base, **changes})


def tiny(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> LanguageModel:
    return build_model(
        config(**changes), vocab_size=VOCAB, max_positions=POSITIONS, dtype=dtype, seed=seed
    )


def row(*documents: list[int], pad: int = 0) -> Stream[Tensor]:
    """One row of packed documents, then padding."""
    tokens = [token for document in documents for token in document] + [0] * pad
    positions = [i for document in documents for i in range(len(document))] + list(range(pad))
    ids = [i for i, document in enumerate(documents) for _ in document] + [-1] * pad
    return Stream(*(torch.tensor([values]) for values in (tokens, positions, ids)))


def random_batch(rows: int, length: int, seed: int = 0, documents: bool = True) -> Batch[Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(0, VOCAB, (rows, length), generator=g)
    targets_BL = torch.randint(0, VOCAB, (rows, length), generator=g)
    weights_BL = torch.randint(0, 2, (rows, length), generator=g).float()
    positions_BL = torch.arange(length).expand(rows, length)
    documents_BL = None
    if documents:
        starts_BL = torch.rand(rows, length, generator=g) < 0.25
        documents_BL = starts_BL.long().cumsum(1)
    stream = Stream(tokens_BL, positions_BL, documents_BL)
    return Batch(stream, None, targets_BL, weights_BL, torch.arange(rows))


def take(batch: Batch[Tensor], rows: slice) -> Batch[Tensor]:
    return batch.map(lambda x: x[rows])


def gradients(model: LanguageModel, batch: Batch[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are no faster with threads, and threads that wait for a busy core cost a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
